"""The tilt that gives features the means asked for: closed forms, optimality, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from sciml.lm import fit_moment_coefficients


def tilted_means(features, coefficients, log_weights=None):
    logw = features @ coefficients + (0 if log_weights is None else log_weights)
    return logw.softmax(0) @ features


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_one_binary_feature_changes_its_odds(share):
    features = (torch.arange(50) % 5 == 0).double()[:, None]
    got = fit_moment_coefficients(features, torch.tensor([share], dtype=torch.float64), tol=1e-12)
    expected = math.log(share / (1 - share)) - math.log(0.2 / 0.8)
    assert float(got) == pytest.approx(expected, abs=1e-9)
    assert (float(got) > 0) == (share > 0.2)


def test_standard_normal_is_shifted():
    """Tilting N(0, 1) by lambda x moves its mean to lambda; x^2 besides changes its variance."""
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    got = fit_moment_coefficients(
        x[:, None], torch.tensor([0.7], dtype=x.dtype), -(x**2) / 2, tol=1e-12
    )
    assert float(got) == pytest.approx(0.7, abs=1e-8)
    features = torch.stack([x, x**2], 1)
    mean, variance = 0.5, 0.3
    moments = torch.tensor([mean, variance + mean**2], dtype=torch.float64)
    got = fit_moment_coefficients(features, moments, -(x**2) / 2, tol=1e-12)
    expected = torch.tensor([mean / variance, 0.5 - 0.5 / variance], dtype=torch.float64)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_reaches_any_attainable_moments(seed, n_features):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(60, n_features, generator=generator, dtype=torch.float64)
    logw = torch.randn(60, generator=generator, dtype=torch.float64)
    moments = torch.randn(60, generator=generator, dtype=torch.float64).softmax(0) @ features
    got = fit_moment_coefficients(features, moments, logw, tol=1e-11)
    torch.testing.assert_close(tilted_means(features, got, logw), moments, atol=1e-9, rtol=0)


def test_is_the_nearest_reweighting():
    """Against a general-purpose solver of min KL(v || w) over all v with the moments."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    moments = torch.tensor([0.2, -0.1], dtype=torch.float64)
    coefficients = fit_moment_coefficients(features, moments)
    ours = (features @ coefficients).softmax(0)
    result = minimize(
        lambda v: float((v * np.log(12 * v)).sum()),
        torch.full((12,), 1 / 12).numpy(),
        bounds=[(1e-9, 1)] * 12,
        constraints=[
            {"type": "eq", "fun": lambda v: v.sum() - 1},
            {"type": "eq", "fun": lambda v: features.numpy().T @ v - moments.numpy()},
        ],
        options={"ftol": 1e-14, "maxiter": 500},
    )
    torch.testing.assert_close(ours, torch.from_numpy(result.x), atol=1e-5, rtol=0)


def test_hard_constraint_besides_moments():
    features = torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=torch.float64)
    logw = torch.tensor([0.0, 0.0, -math.inf, -math.inf], dtype=torch.float64)
    got = fit_moment_coefficients(features, torch.tensor([0.75]).double(), logw, tol=1e-12)
    assert float(got) == pytest.approx(math.log(3), abs=1e-6)


def test_dependent_and_constant_features_dtypes():
    group = torch.eye(3).repeat(5, 1)  # one-hot: the columns sum to one
    features = torch.cat([group, torch.ones(15, 1)], 1)
    moments = torch.tensor([0.2, 0.3, 0.5, 1.0])
    got = fit_moment_coefficients(features, moments)
    assert got.dtype == torch.float32
    torch.testing.assert_close(tilted_means(features, got), moments, atol=2e-6, rtol=0)
    whole = fit_moment_coefficients(features.bool(), moments)
    assert whole.dtype == torch.float64
    scaled = fit_moment_coefficients(1e6 * features, 1e6 * moments)
    torch.testing.assert_close(1e6 * scaled, got, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("moments.0. must lie strictly between .* 0 and 1, got 1.2", (torch.eye(2), [1.2, 0.5])),
        ("moments.1. must lie strictly", (torch.eye(2), [0.5, 1.0])),  # needs lambda = infinity
        ("moments.0. must lie strictly .*0 and 0", (torch.zeros(4, 1), [0.1])),  # never occurs
        ("moments must be attainable", (torch.eye(2), [0.5, 0.7])),  # jointly impossible
        (
            "moments must be attainable",
            (torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), [0.8, 0.8]),
        ),
        ("moments must have shape .2", (torch.eye(2), [0.5])),
        ("features must have shape", (torch.ones(3), [0.5])),
        ("features must be finite", (torch.full((2, 1), math.nan), [0.5])),
        ("moments must be finite", (torch.eye(2), [math.nan, 0.5])),
        ("log_weights must be finite or -inf", (torch.eye(2), [0.5, 0.5], [math.nan, 0.0])),
        ("log_weights must leave a sample", (torch.eye(2), [0.5, 0.5], [-math.inf, -math.inf])),
        ("log_weights must have shape .2", (torch.eye(2), [0.5, 0.5], [0.0])),
        ("features must hold a sample", (torch.zeros(0, 1), [0.5])),
    ],
)
def test_bad_input(match, arguments):
    features, *rest = arguments
    with pytest.raises(ValueError, match=match):
        fit_moment_coefficients(features, *(torch.tensor(x) for x in rest))


def test_bad_options():
    with pytest.raises(ValueError, match="tol"):
        fit_moment_coefficients(torch.eye(2), torch.tensor([0.5, 0.5]), tol=0)
    with pytest.raises(ValueError, match="max_iter"):
        fit_moment_coefficients(torch.eye(2), torch.tensor([0.5, 0.5]), max_iter=0)
