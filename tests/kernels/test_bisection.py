"""Lockstep bisection against known thresholds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sciml.kernels.bisection import largest_certified_radii


def radii(thresholds, wanted=None, scale=1.0, max_radius=None, tol=1e-6):
    thresholds = np.asarray(thresholds, dtype=float)
    wanted = np.ones(len(thresholds), dtype=bool) if wanted is None else np.asarray(wanted)
    return largest_certified_radii(
        lambda rows, radius: (radius < thresholds[rows]) & (thresholds[rows] > 0),
        wanted,
        scale=scale,
        max_radius=max_radius,
        tol=tol,
    )


@settings(max_examples=100, deadline=None)
@given(
    thresholds=st.lists(st.floats(1e-9, 1e5), max_size=20),
    tol=st.sampled_from([1e-2, 1e-6, 1e-12]),
)
def test_result_is_just_below_the_threshold(thresholds, tol):
    found = radii(thresholds, tol=tol)
    assert found.shape == (len(thresholds),)
    assert (found < thresholds).all()
    assert (found >= (1 - tol) * np.array(thresholds) * (1 - 1e-15)).all()


def test_limits():
    found = radii([0.3, 0.0, 0.3, np.inf, 5.0], [True, True, False, True, True], max_radius=2.0)
    np.testing.assert_allclose(found, [0.3, 0, 0, 2.0, 2.0], rtol=1e-6)
    assert radii([np.inf], scale=3.0)[0] == 3.0 * 2**20
    assert radii([0.3], max_radius=0.001)[0] == 0.001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tol": 0.0}, "tol"),
        ({"tol": 1.0}, "tol"),
        ({"max_radius": 0.0}, "max_radius"),
        ({"max_radius": np.inf}, "max_radius"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        radii([1.0], **arguments)
