"""Calibration metrics: closed forms, loops written out, another library."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import log_loss

from sciml.lm import aurc, eaurc, expected_calibration_error, negative_log_likelihood


def predictions(seed, n=50, n_classes=4):
    rng = np.random.default_rng(seed)
    return rng.integers(n_classes, size=n), softmax(2 * rng.standard_normal((n, n_classes)), 1)


def test_closed_forms():
    sure = np.eye(3)[[0, 1, 2, 0]]
    assert expected_calibration_error([0, 1, 2, 0], sure) == 0
    half = np.tile([0.8, 0.2], (10, 1))
    assert expected_calibration_error([0, 1] * 5, half) == pytest.approx(0.3)
    assert aurc([0, 1, 2, 0], sure) == 0
    assert aurc([1, 2, 0, 1], sure) == 1
    assert eaurc([1, 2, 0, 1], sure) == pytest.approx(0)
    assert eaurc([0, 1, 2, 0], sure) == 0
    uniform = np.full((5, 4), 0.25)
    assert negative_log_likelihood([0, 1, 2, 3, 0], uniform) == pytest.approx(math.log(4))
    assert negative_log_likelihood([1], [[1.0, 0.0]]) == math.inf


def test_bins_are_open_on_the_left():
    """0.7 is in (0.6, 0.7]: with 0.65 it makes one bin, with 0.75 it would not."""
    proba = np.array([[0.7, 0.3], [0.65, 0.35]])
    one_bin = abs((1 - 0.7) + (0 - 0.65)) / 2
    assert expected_calibration_error([0, 1], proba) == pytest.approx(one_bin)
    proba[1] = [0.75, 0.25]
    assert expected_calibration_error([0, 1], proba) == pytest.approx((0.3 + 0.75) / 2)


def plain_ece(y, p, n_bins):
    confidence, hit = p.max(1), p.argmax(1) == y
    total = 0.0
    for k in range(n_bins):
        inside = (confidence > k / n_bins) & (confidence <= (k + 1) / n_bins)
        if inside.any():
            total += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return total


def plain_aurc(y, p):
    confidence, wrong = p.max(1), p.argmax(1) != y
    order = sorted(range(len(y)), key=lambda i: (confidence[i], i), reverse=True)
    risks = [np.mean(wrong[order[: k + 1]]) for k in range(len(y))]
    return np.mean(risks)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 15))
@settings(max_examples=40, deadline=None)
def test_equal_loops_and_laws(seed, n, n_bins):
    y, p = predictions(seed, n)
    assert expected_calibration_error(y, p, n_bins) == pytest.approx(plain_ece(y, p, n_bins))
    assert aurc(y, p) == pytest.approx(plain_aurc(y, p))
    errors = int((p.argmax(1) != y).sum())
    best = sum(j / (n - errors + j) for j in range(1, errors + 1)) / n
    assert eaurc(y, p) == pytest.approx(aurc(y, p) - best, abs=1e-12)
    assert eaurc(y, p) >= -1e-12
    shuffle = np.random.default_rng(seed).permutation(n)
    assert aurc(y[shuffle], p[shuffle]) == pytest.approx(aurc(y, p))
    assert negative_log_likelihood(y, p) == pytest.approx(log_loss(y, p, labels=range(4)))


def test_ties_are_in_reversed_order():
    tied = np.tile([0.6, 0.4], (3, 1))
    assert aurc([1, 0, 0], tied) == pytest.approx((0 + 0 + 1 / 3) / 3)
    assert aurc([0, 0, 1], tied) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_labels_name_the_columns():
    y, p = predictions(0)
    names = np.array(["d", "a", "c", "b"])
    for metric in (expected_calibration_error, aurc, eaurc, negative_log_likelihood):
        assert metric(names[y], p, labels=names) == metric(y, p)
        assert metric(y.astype(float), p.astype(np.float32)) == pytest.approx(metric(y, p), 1e-5)


@pytest.mark.parametrize(
    ("match", "y", "p", "options"),
    [
        ("proba must have shape", [0], [0.5, 0.5], {}),
        ("proba must have shape", [], np.zeros((0, 2)), {}),
        ("proba must have shape", [0], [[1.0]], {}),
        ("y_true must have shape .2,", [0], [[0.5, 0.5]] * 2, {}),
        ("rows sum to 1", [0], [[0.5, 0.6]], {}),
        ("rows sum to 1", [0], [[np.nan, 0.5]], {}),
        ("rows sum to 1", [0], [[1.5, -0.5]], {}),
        ("y_true must hold classes among .0, 1., got 2", [2], [[0.5, 0.5]], {}),
        ("y_true must hold classes", [-1], [[0.5, 0.5]], {}),
        ("y_true must hold classes", ["z"], [[0.5, 0.5]], {"labels": ["a", "b"]}),
        ("labels must be 2 different", [0], [[0.5, 0.5]], {"labels": [0, 0]}),
        ("labels must be 2 different", [0], [[0.5, 0.5]], {"labels": [0, 1, 2]}),
    ],
)
def test_bad_input(match, y, p, options):
    for metric in (expected_calibration_error, aurc, eaurc, negative_log_likelihood):
        with pytest.raises(ValueError, match=match):
            metric(y, p, **options)
    with pytest.raises(ValueError, match="n_bins"):
        expected_calibration_error([0], [[0.5, 0.5]], n_bins=0)
