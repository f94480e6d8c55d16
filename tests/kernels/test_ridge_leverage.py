"""Exact ridge leverage scores: definition, bounds, and special kernels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sciml.kernels import NTK, effective_dimension, pairwise_kernel, ridge_leverage_scores


def points(n=60, d=3, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def dense_scores(K, ridge):
    return np.diag(K @ np.linalg.inv(K + ridge * np.eye(len(K))))


@pytest.mark.parametrize("ridge", [1e-2, 1.0, 100.0])
def test_definition(ridge):
    K = pairwise_kernel(points(700), gamma=0.3)
    np.testing.assert_allclose(ridge_leverage_scores(K, ridge), dense_scores(K, ridge), atol=1e-10)
    assert effective_dimension(K, ridge) == pytest.approx(dense_scores(K, ridge).sum())


def test_from_points_with_any_kernel():
    X = points()
    for kernel in ("rbf", NTK(depth=2), lambda a, b: a @ b.T + 1):
        K = pairwise_kernel(X, None, kernel)
        np.testing.assert_allclose(
            ridge_leverage_scores(X, 0.5, kernel=kernel), dense_scores(K, 0.5), atol=1e-10
        )


def test_linear_kernel_gives_leverage_of_ridge_regression():
    X = points()
    expected = np.einsum("ij,jk,ik->i", X, np.linalg.inv(X.T @ X + 2 * np.eye(3)), X)
    np.testing.assert_allclose(ridge_leverage_scores(X, 2.0, kernel="linear"), expected, atol=1e-12)


def test_identity_and_vanishing_ridge():
    np.testing.assert_allclose(ridge_leverage_scores(np.eye(5), 3.0), 1 / 4)
    K = pairwise_kernel(points(20), gamma=5.0)
    assert ridge_leverage_scores(K, 1e-9).min() > 1 - 1e-6


def test_monotone_in_the_stream():
    K = pairwise_kernel(points(40), gamma=0.5)
    before = ridge_leverage_scores(K[:1, :1], 1.0)
    for t in range(2, 41):
        scores = ridge_leverage_scores(K[:t, :t], 1.0)
        assert (scores[:-1] <= before + 1e-12).all()
        # Sherman-Morrison and Cauchy-Schwarz: one arrival takes at most its own share.
        assert (scores[:-1] >= before * (1 - scores[-1]) - 1e-12).all()
        assert scores.sum() >= before.sum() - 1e-12
        before = scores


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.floats(0.01, 100), st.integers(0, 1000))
def test_scores_stay_below_the_diagonal_bound(n, ridge, seed):
    K = pairwise_kernel(points(n, 2, seed), gamma=1.0)
    scores = ridge_leverage_scores(K, ridge)
    assert (scores >= 0).all()
    assert (scores <= 1 / (1 + ridge) + 1e-9).all()  # k_ii = 1
    assert n * scores.max() >= scores.sum() - 1e-12


def test_duplicates_share_their_score():
    X = points(10)
    alone = ridge_leverage_scores(X, 1.0, kernel="rbf")
    doubled = ridge_leverage_scores(np.concatenate([X, X]), 2.0, kernel="rbf")
    np.testing.assert_allclose(doubled[:10] + doubled[10:], alone, atol=1e-12)


def test_libraries_agree():
    K = pairwise_kernel(points())
    numpy_scores = ridge_leverage_scores(K, 0.3)
    torch_scores = ridge_leverage_scores(torch.as_tensor(K), 0.3)
    assert isinstance(torch_scores, torch.Tensor)
    np.testing.assert_allclose(torch_scores.numpy(), numpy_scores, atol=1e-12)
    single = ridge_leverage_scores(K.astype(np.float32), 0.3)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, numpy_scores, atol=1e-4)


def test_caller_keeps_the_matrix():
    K = pairwise_kernel(points())
    copy = K.copy()
    ridge_leverage_scores(K, 0.3)
    assert (K == copy).all()


@pytest.mark.parametrize(
    ("K", "ridge", "message"),
    [
        (np.eye(3), 0.0, "ridge .*0.0"),
        (np.ones((2, 3)), 1.0, "K must be a square"),
        (np.array([[1.0, 2.0], [0.0, 1.0]]), 1.0, "K must be symmetric"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), 10.0, "negative eigenvalue"),
        (np.diag([1.0, -1.0]), 10.0, "diagonal"),
        (np.full((2, 2), np.nan), 1.0, "K must be finite"),
    ],
)
def test_bad_input_is_named(K, ridge, message):
    with pytest.raises(ValueError, match=message):
        ridge_leverage_scores(K, ridge)
