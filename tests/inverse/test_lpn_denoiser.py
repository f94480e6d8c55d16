"""The estimator obeys scikit-learn, learns, and scores by the prior."""

import copy

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.utils.estimator_checks import parametrize_with_checks

from sciml.inverse import FullyConnectedLPN, LearnedProximalNetwork, LPNDenoiser, LPNPrior

SMALL = {"width": 6, "n_steps": 30, "batch_size": 16, "random_state": 0}


@parametrize_with_checks([LPNDenoiser(width=4, n_steps=6, batch_size=8, random_state=0)])
def test_obeys_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6,), (8, 8), (2, 8, 9)])
def test_arrays_of_vectors_and_images(shape, dtype):
    X = np.random.default_rng(0).random((20, *shape)).astype(dtype)
    denoiser = LPNDenoiser(**SMALL, validation_fraction=0.25).fit(X)
    out = denoiser.transform(X)
    assert out.shape == X.shape
    assert out.dtype == dtype
    kind = FullyConnectedLPN if len(shape) == 1 else LearnedProximalNetwork
    assert isinstance(denoiser.network_, kind)
    assert denoiser.history_.validation[-1]["step"] == 30
    assert denoiser.n_iter_ == 30
    again = clone(denoiser).fit(X)
    np.testing.assert_array_equal(again.transform(X), out)


def test_learns_to_denoise_where_the_prior_is_a_line():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 1)) @ np.ones((1, 8))
    options = {**SMALL, "n_steps": 300, "width": 16, "sigma": 0.5, "beta": 1.0}
    denoiser = LPNDenoiser(**options).fit(X)
    clean = rng.normal(size=(100, 1)) @ np.ones((1, 8))
    noisy = clean + 0.5 * rng.normal(size=clean.shape)
    after = np.mean((denoiser.transform(noisy) - clean) ** 2)
    assert after < 0.5 * 0.25
    assert np.mean(denoiser.score_samples(clean) > denoiser.score_samples(noisy)) > 0.9


def test_score_is_the_prior_over_the_noise_variance():
    X = load_digits().images[:40] / 16.0
    denoiser = LPNDenoiser(**SMALL, sigma=0.2).fit(X)
    import torch

    prior = LPNPrior(copy.deepcopy(denoiser.network_)).fn(torch.tensor(X)[:, None])
    np.testing.assert_allclose(denoiser.score_samples(X), -prior.numpy() / 0.04, rtol=1e-6)


def test_float32_samples_do_not_change_a_float64_network():
    X = np.random.default_rng(0).random((20, 4))
    denoiser = LPNDenoiser(**SMALL).fit(X)
    before = denoiser.transform(X)
    denoiser.transform(X.astype(np.float32))
    np.testing.assert_array_equal(denoiser.transform(X), before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"strong_convexity": 0.0}, "strong_convexity"),
        ({"n_steps": 0}, "n_steps"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"gamma_min": -1.0}, "gamma_min"),
        ({"batch_size": 0}, "batch_size"),
        ({"width": 0}, "width|hidden"),
    ],
)
def test_bad_parameters(options, match):
    with pytest.raises(ValueError, match=match):
        LPNDenoiser(**{**SMALL, **options}).fit(np.zeros((9, 3)))


def test_bad_shapes():
    with pytest.raises(ValueError, match="dimensions, got 5"):
        LPNDenoiser(**SMALL).fit(np.zeros((9, 1, 1, 2, 2)))
    fitted = LPNDenoiser(**SMALL).fit(np.zeros((9, 4, 4)))
    with pytest.raises(ValueError, match=r"\(4, 4\), got \(4, 5\)"):
        fitted.transform(np.zeros((9, 4, 5)))
