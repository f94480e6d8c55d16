import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sciml.lm import EntropyGatedLengthCurriculum

LENGTHS = (8, 16, 32, 64)


def test_cap_rises_twice_and_freezes_at_the_third_length():
    curriculum = EntropyGatedLengthCurriculum(LENGTHS, min_entropy=0.5)
    assert curriculum.cap == 8
    assert [curriculum.step(entropy) for entropy in (1.0, 0.9, 0.2, 1.0, 1.0)] == [
        16,
        32,
        32,
        32,
        32,
    ]
    assert curriculum.frozen


def test_threshold_is_a_share_of_the_initial_entropy():
    curriculum = EntropyGatedLengthCurriculum(LENGTHS, min_entropy_ratio=0.25)
    with pytest.raises(ValueError, match="begin must be called"):
        curriculum.step(1.0)
    curriculum.begin(2.0)
    assert curriculum.threshold == 0.5
    assert curriculum.step(0.5) == 16
    assert curriculum.step(0.4999) == 16
    assert curriculum.frozen
    fixed = EntropyGatedLengthCurriculum(LENGTHS, min_entropy=0.1)
    fixed.begin(2.0)
    assert fixed.threshold == 0.1


def test_patience_counts_low_stages_in_a_row():
    curriculum = EntropyGatedLengthCurriculum(LENGTHS, min_entropy=0.5, patience=2)
    assert [curriculum.step(h) for h in (0.1, 0.6, 0.1, 0.1, 0.9)] == [8, 16, 16, 16, 16]


@given(st.lists(st.floats(0, 2), max_size=12), st.integers(1, 3), st.integers(0, 12))
def test_cap_never_falls_and_a_restored_curriculum_goes_on_alike(entropies, patience, cut):
    def new():
        return EntropyGatedLengthCurriculum(LENGTHS, min_entropy=0.5, patience=patience)

    whole = new()
    caps = [whole.step(h) for h in entropies]
    assert caps == sorted(caps)
    first, second = new(), new()
    parts = [first.step(h) for h in entropies[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert parts + [second.step(h) for h in entropies[cut:]] == caps
    assert second.frozen == whole.frozen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "lengths must hold one"),
        ({"lengths": (8, 8)}, "lengths must increase"),
        ({"lengths": (0, 8)}, "lengths must be an integer"),
        ({"min_entropy": -0.1}, "min_entropy"),
        ({"min_entropy": math.nan}, "min_entropy"),
        ({"min_entropy_ratio": 0.0}, "min_entropy_ratio"),
        ({"patience": 0}, "patience"),
        ({"stage_steps": 0}, "stage_steps"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        EntropyGatedLengthCurriculum(**options)


@pytest.mark.parametrize("entropy", [math.nan, math.inf, -0.1])
def test_bad_entropy(entropy):
    curriculum = EntropyGatedLengthCurriculum(LENGTHS, min_entropy=0.5)
    for call in (curriculum.begin, curriculum.step):
        with pytest.raises(ValueError, match="entropy"):
            call(entropy)
    assert curriculum.cap == 8


def test_state_of_other_lengths_is_refused():
    state = EntropyGatedLengthCurriculum(LENGTHS).state_dict()
    with pytest.raises(ValueError, match="lengths must be the state's"):
        EntropyGatedLengthCurriculum((8, 16)).load_state_dict(state)
