from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sciml.lm import (
    LanguageModelAnnotator,
    RuleAnnotator,
    SpanAnnotation,
    route_tokens,
    split_sentences,
    token_offsets,
)

OFFSETS = [(i, i + 1) for i in range(20)]


def test_tokens_that_overlap_a_segment_are_marked():
    offsets = [(0, 4), (4, 7), (7, 7), (7, 12), (12, 13)] + [(13, 14)] * 3
    key, error = route_tokens(offsets, [(5, 8)], "key")
    assert key.tolist() == [False, True, False, True] + [False] * 4  # the special token is not
    assert not error.any()
    key, error = route_tokens(torch.tensor(offsets), [(5, 8)], "error")
    assert not key.any()
    assert error.nonzero().flatten().tolist() == [1, 3]


def test_coverage_is_capped_in_the_annotators_order():
    forty_percent = [(8, 10), (2, 4), (15, 17), (0, 2)]
    mask, _ = route_tokens(OFFSETS, forty_percent, "key")
    assert mask.nonzero().flatten().tolist() == [2, 3, 8, 9]  # 5 are allowed, segments have 2
    assert mask.double().mean() <= 0.25
    mask, _ = route_tokens(OFFSETS, [(0, 6), (8, 9)], "key")  # the first never fits
    assert mask.nonzero().flatten().tolist() == [8]
    mask, _ = route_tokens(OFFSETS, forty_percent, "key", max_coverage=1.0)
    assert mask.sum() == 8
    assert not route_tokens(OFFSETS, forty_percent, "key", max_coverage=0.0)[0].any()


@given(
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=8),
    st.floats(0, 1),
)
def test_cap_and_idempotence(n, pairs, coverage):
    offsets = [(i, i + 1) for i in range(n)]
    segments = [(start, start + length) for start, length in pairs]
    mask, _ = route_tokens(offsets, segments, "key", coverage)
    assert int(mask.sum()) <= coverage * n + 1e-6
    marked = {t for t in range(n) if mask[t]}
    assert marked <= {t for start, end in segments for t in range(start, end)}
    # Each segment is taken whole or, beyond what others mark, not at all.
    for start, end in segments:
        whole = set(range(start, min(end, n)))
        assert whole <= marked or len(whole | marked) > int(coverage * n + 1e-9) or not whole


def test_sentences():
    text = "  First, 1.5 + 2 = 3.5. So it is!  Right?\n\nlast line \n."
    found = [text[start:end] for start, end in split_sentences(text)]
    assert found == ["First, 1.5 + 2 = 3.5.", "So it is!", "Right?", "last line", "."]
    assert split_sentences(" \n ") == []


@given(st.text(alphabet="ab .!?\n", max_size=40))
def test_sentences_are_ordered_and_lose_nothing_but_blanks(text):
    ranges = split_sentences(text)
    kept = "".join(text[start:end] for start, end in ranges)
    assert kept.replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))


class ByteTokenizer:
    """Tokens are bytes; 256 is special."""

    def decode(self, ids, skip_special_tokens):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class PieceTokenizer:
    """As SentencePiece: the space in front of the first token is not decoded."""

    PIECES = (" the", " cat", "s", " sat", "")

    def decode(self, ids, skip_special_tokens):
        return "".join(self.PIECES[i] for i in ids).removeprefix(" ")


def test_offsets_of_pieces():
    assert token_offsets(PieceTokenizer(), [0, 1, 2, 3, 4]) == [
        (0, 3),
        (3, 7),
        (7, 8),
        (8, 12),
        (12, 12),
    ]
    # Not the tokens into which the text would be cut, but those that were drawn.
    assert token_offsets(PieceTokenizer(), [2, 2, 0]) == [(0, 1), (1, 2), (2, 6)]
    assert token_offsets(PieceTokenizer(), []) == []


def test_tokens_that_share_a_character_have_it_in_their_range():
    text = "a größer 語x" * 3
    ids = [*text.encode(), 256]
    ranges = token_offsets(ByteTokenizer(), ids)
    assert ranges[-1][0] == ranges[-1][1] == len(text)
    for t, (start, end) in enumerate(ranges[:-1]):
        character = len(bytes(ids[: t + 1]).decode("utf-8", errors="ignore"))
        whole = bytes(ids[: t + 1]).decode("utf-8", errors="replace").endswith("\ufffd")
        assert start <= (character if whole else character - 1) < end


def test_annotations_and_rules():
    annotate = RuleAnnotator()
    segments = ["Read the task.", "So 2 * 3 = 6.", "Done."]
    assert annotate("2 * 3?", segments, True, "6") == SpanAnnotation((1,), "key", "decisive step")
    wrong = ["Read the task.", "2 * 3 = 5.", "So 5."]
    assert annotate("2 * 3?", wrong, False, "6") == SpanAnnotation((1,), "error", "wrong step")
    assert annotate("2 * 3?", ["Yes.", "No."], False, "6").segments == (1,)
    assert annotate("2 * 3?", [], False, "6").segments == ()
    with pytest.raises(ValueError, match="kind"):
        SpanAnnotation((0,), "good", "x")
    with pytest.raises(ValueError, match="segments"):
        SpanAnnotation((-1,), "key", "x")


def test_language_model_annotator_reads_json_and_keeps_the_list_of_types_closed():
    asked = []

    def complete(prompt):
        asked.append(prompt)
        return replies.pop(0)

    replies = [
        'Sure: {"segments": [2, 0], "type": "arithmetic"} as asked.',
        '{"segments": [3], "type": "arithmetic"}',
        '{"segments": [0], "type": "the answer is 6"}',
        '{"segments": 0, "type": "arithmetic"}',
        "{segments}",
        "none",
    ]
    annotate = LanguageModelAnnotator(complete)
    segments = ["a", "b", "c"]
    found = annotate("p", segments, True, "r")
    assert found == SpanAnnotation((2, 0), "key", "arithmetic")
    for i in range(1, 6):
        assert annotate("p", segments, False, "r") == SpanAnnotation((), "error", "")
        assert annotate.n_unreadable_ == i
    assert "[2] c" in asked[0]
    assert "correct" in asked[0]
    assert "wrong" in asked[1]
    with pytest.raises(TypeError, match="complete"):
        LanguageModelAnnotator("gpt")
    with pytest.raises(ValueError, match="types"):
        LanguageModelAnnotator(complete, "arithmetic")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((OFFSETS, [(0, 1)], "good"), ValueError, "kind"),
        ((OFFSETS, [(0, 1)], "key", 1.5), ValueError, "max_coverage"),
        (([(3, 2)], [(0, 1)], "key"), ValueError, "offsets"),
        ((OFFSETS, [(3, 2)], "key"), ValueError, "segments"),
        ((OFFSETS, [(0.5, 2)], "key"), TypeError, "segments"),
    ],
)
def test_bad_input(arguments, error, match):
    with pytest.raises(error, match=match):
        route_tokens(*arguments)
