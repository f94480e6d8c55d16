"""Argument checks name the argument, the value and the expectation."""

import tracemalloc

import numpy as np
import pytest
import torch

from sciml._check import (
    check_choice,
    check_finite,
    check_integer,
    check_interval,
    check_same_length,
    check_shape,
    check_square,
)


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: check_interval("C", 0.0, 0, closed="neither"), ValueError, r"C .*\(0, inf\).*0.0"),
        (lambda: check_interval("C", np.nan, 0), ValueError, "C .*nan"),
        (lambda: check_interval("C", "1", 0), TypeError, "C .*real.*'1'"),
        (lambda: check_interval("C", True, 0), TypeError, "C .*real.*True"),
        (lambda: check_integer("depth", 1.0, 1), TypeError, "depth .*integer.*1.0"),
        (lambda: check_integer("depth", 0, 1), ValueError, r"depth .*\[1, inf\].*0"),
        (lambda: check_choice("loss", "l2", ["hinge"]), ValueError, "loss .*'hinge'.*'l2'"),
        (lambda: check_choice("flag", 1, [True]), ValueError, "flag .*True.*1"),
        (lambda: check_finite("X", np.array([1.0, np.inf])), ValueError, "X .*finite"),
        (lambda: check_finite("X", torch.tensor([np.nan])), ValueError, "X .*finite"),
        (lambda: check_shape("x", np.ones((2, 3)), (None, 4)), ValueError, r"\(any, 4\).*\(2, 3\)"),
        (lambda: check_square("K", np.ones((2, 3))), ValueError, r"K .*square.*\(2, 3\)"),
        (lambda: check_same_length(X=[1], y=[1, 2]), ValueError, "X has 1, y has 2"),
    ],
)
def test_bad_values_are_named(check, error, message):
    with pytest.raises(error, match=message):
        check()


@pytest.mark.parametrize("bad", [[np.inf, -np.inf], [1.0, np.nan], [-np.inf, 1.0]])
@pytest.mark.parametrize("make", [np.array, np.float32, torch.tensor, lambda a: np.array(a) + 1j])
def test_what_is_not_finite_is_found(make, bad):
    with pytest.raises(ValueError, match="X .*finite"):
        check_finite("X", make(bad))


def test_finite_values_may_have_an_infinite_sum_and_need_no_flags():
    check_finite("X", np.full(2, 3e38, np.float32))
    check_finite("X", torch.full((2,), 6e4, dtype=torch.float16))
    check_finite("X", np.zeros((0, 3)))
    X = np.ones((1000, 1000))
    tracemalloc.start()
    check_finite("X", X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < X.size // 10


def test_good_values_pass():
    check_interval("C", 1, 0, 1)
    check_interval("C", np.float32(0.5), 0, 1)
    check_integer("depth", np.int64(3), 1)
    check_choice("loss", "hinge", ["hinge", "squared"])
    check_finite("X", np.arange(3))
    check_finite("X", torch.arange(3))
    check_shape("x", np.ones((2, 3)), (None, 3))
    check_square("K", np.eye(2))
    check_same_length(X=[1], y=[2])
