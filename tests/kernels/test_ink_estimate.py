"""INK-Estimate: increments, estimator bounds, the Woodbury form, and unbiased weights."""

import copy
import time
import warnings

import numpy as np
import pytest

from sciml.kernels import effective_dimension, ink_estimate, pairwise_kernel, ridge_leverage_scores
from sciml.kernels.ink_estimate import INKStream


def clustered(n=150, seed=0):
    rng = np.random.default_rng(seed)
    blob = rng.normal(0, 0.15, (n - n // 10, 2))
    return rng.permutation(np.concatenate([blob, rng.normal(4, 3, (n // 10, 2))]))


def dense_step(K, indices, weights, ridge, eps):
    """Scores of the dictionary at t - 1 and of point t, all matrices formed."""
    alpha = (2 - eps) / (1 - eps)
    t = len(K) - 1
    S = np.zeros((t, len(indices)))
    S[indices, np.arange(len(indices))] = np.sqrt(weights)
    past = K[:t, :t]
    sketch = past @ S @ np.linalg.solve(S.T @ past @ S + ridge * np.eye(len(indices)), S.T @ past)
    border = np.block([[sketch, K[:t, t:]], [K[t:, :t], K[t:, t:]]])
    inverse = np.linalg.inv(border + alpha * ridge * np.eye(t + 1))
    columns = [*indices, t]
    quadratic = np.einsum("ij,ik,kj->j", K[:, columns], inverse, K[:, columns])
    return (K[columns, columns] - quadratic) / (alpha * ridge)


def dense_increment(K, ridge):
    A = np.linalg.inv(K[:-1, :-1] + ridge * np.eye(len(K) - 1))
    k, c = K[:-1, -1], K[-1, -1]
    return (c - k @ A @ k - ridge * k @ A @ A @ k) / (c + ridge - k @ A @ k)


def test_exact_increments_sum_to_the_effective_dimension():
    K = pairwise_kernel(clustered(60), gamma=1.0)
    total = effective_dimension(K[:1, :1], 0.7)
    for t in range(2, 61):
        total += dense_increment(K[:t, :t], 0.7)
    assert total == pytest.approx(effective_dimension(K, 0.7), abs=1e-10)


@pytest.mark.parametrize("form", ["copies", "weights"])
def test_woodbury_equals_dense(form):
    K = pairwise_kernel(clustered(60), gamma=1.0)
    stream = INKStream(1.0, 400, 0.5, form, "safe")
    rng = np.random.RandomState(0)
    checked = 0
    for t in range(60):
        indices, weights = stream.indices.copy(), stream.weights.copy()
        if 0 < len(indices):
            expected = dense_step(K[: t + 1, : t + 1], indices, weights, 1.0, 0.5)
            got, *_ = stream.estimate(K[:t, t], K[t, t])
            np.testing.assert_allclose(got, np.clip(expected, 0, 1), atol=1e-10)
            checked += len(indices)
        stream.update(K[:t, t], K[t, t], rng)
    assert checked > 100


def test_full_dictionary_brackets_the_scores():
    K = pairwise_kernel(clustered(40), gamma=1.0)
    stream = INKStream(1.0, 400, 0.5, "copies", "safe")
    stream._shrink = lambda scores, rng: setattr(stream, "scores", scores)
    for t in range(40):
        stream.update(K[:t, t], K[t, t], None)
        exact = ridge_leverage_scores(K[: t + 1, : t + 1], 1.0)
        assert (stream.scores <= exact + 1e-12).all()
        assert (stream.scores >= exact / 3 - 1e-12).all()  # alpha = 3 for eps = 1/2
        assert stream.effective_dimension >= exact.sum() - 1e-12


@pytest.mark.parametrize("deff", ["safe", "paper"])
@pytest.mark.parametrize("form", ["copies", "weights"])
def test_estimates_of_the_effective_dimension(form, deff):
    X = clustered(300)
    exact = effective_dimension(X, 1.0, kernel="rbf", gamma=1.0)
    result = ink_estimate(
        X, 1.0, budget=600, gamma=1.0, shrink_expand=form, deff=deff, random_state=0
    )
    assert exact < result.effective_dimension < 3 * exact
    assert len(result.indices) < 200
    assert (np.diff(result.probabilities) <= 1).all()


@pytest.mark.parametrize("form", ["copies", "weights"])
def test_weights_are_unbiased(form):
    X = clustered(50)
    total = np.zeros(50)
    runs = 150
    for seed in range(runs):
        result = ink_estimate(X, 1.0, budget=300, gamma=1.0, shrink_expand=form, random_state=seed)
        total[result.indices] += result.weights
    mean = total / runs
    assert mean.mean() == pytest.approx(1, abs=0.05)
    assert np.abs(mean - 1).max() < 0.8


def test_kernel_matrix_and_points_agree():
    X = clustered(60)
    K = pairwise_kernel(X, gamma=1.0)
    a = ink_estimate(X, 1.0, gamma=1.0, random_state=0)
    b = ink_estimate(K, 1.0, kernel="precomputed", random_state=0)
    assert a.indices.tolist() == b.indices.tolist()
    np.testing.assert_allclose(a.leverage_scores, b.leverage_scores, atol=1e-8)


def test_small_budget_warns_and_keeps_a_point():
    with pytest.warns(UserWarning, match="budget=2 is too small"):
        result = ink_estimate(clustered(200), 1.0, budget=2, gamma=1.0, random_state=0)
    assert len(result.indices) >= 1
    assert np.isfinite(result.weights).all()


@pytest.mark.parametrize("budget", [20, 50])
@pytest.mark.parametrize("form", ["copies", "weights"])
def test_lost_accuracy_never_passes_in_silence(form, budget):
    """A dictionary that leaves most of the matrix unexplained has warned."""
    X = clustered(300)
    K = pairwise_kernel(X, gamma=1.0)
    with pytest.warns(UserWarning, match=f"budget={budget} is too small for ridge=0.1"):
        ink_estimate(
            K, 0.1, budget=budget, kernel="precomputed", shrink_expand=form, random_state=0
        )


def test_sufficient_budget_is_silent():
    X = clustered(300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in ("copies", "weights"):
            ink_estimate(X, 1.0, budget=1500, gamma=1.0, shrink_expand=form, random_state=0)


def test_steps_are_atomic():
    """A copy of the state taken before a step is not touched by it."""
    K = pairwise_kernel(clustered(90), gamma=1.0)
    stream, straight = (INKStream(1.0, 100, 0.5, "copies", "safe") for _ in range(2))
    rng, straight_rng = np.random.RandomState(0), np.random.RandomState(0)
    for t in range(90):
        before = copy.copy(stream)
        stream.update(K[:t, t], K[t, t], np.random.RandomState(99))  # a step that is given up
        stream = before
        stream.update(K[:t, t], K[t, t], rng)
        straight.update(K[:t, t], K[t, t], straight_rng)
        np.testing.assert_array_equal(stream.indices, straight.indices)
    np.testing.assert_array_equal(stream.scores, straight.scores)
    assert stream.effective_dimension == straight.effective_dimension


def test_columns_kept_are_those_of_the_kernel_matrix():
    """Spare rows are used again and room grows without mixing columns up."""
    K = pairwise_kernel(clustered(300), gamma=1.0)
    stream = INKStream(1.0, 600, 0.5, "copies", "safe")
    rng = np.random.RandomState(0)
    for t in range(300):
        stream.update(K[:t, t], K[t, t], rng)
    assert stream._slots.tolist() != sorted(stream._slots.tolist())
    kept = stream._columns[stream._slots, :300]
    np.testing.assert_array_equal(kept, K[stream.indices])
    np.testing.assert_allclose(stream._gram, kept @ kept.T, atol=1e-10)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_indefinite_kernel_is_refused(sign):
    def kernel(X, Y):
        return sign * (X == Y.T) + 2.0 * (X != Y.T)

    with pytest.raises(ValueError, match="kernel must be positive semidefinite"):
        ink_estimate(np.array([[0.0], [1.0]]), kernel=kernel)


def test_guarantee_on_clustered_data():
    X = clustered(200)
    K = pairwise_kernel(X, gamma=1.0)
    result = ink_estimate(X, 1.0, budget=2000, gamma=1.0, random_state=0)
    root = np.sqrt(result.weights)
    C = K[:, result.indices] * root
    W = root[:, None] * K[np.ix_(result.indices, result.indices)] * root + np.eye(len(root))
    error = np.linalg.eigvalsh(K - C @ np.linalg.solve(W, C.T))
    assert error.min() > -1e-9
    assert error.max() < 2  # ridge / (1 - eps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ridge": 0.0}, "ridge .*0.0"),
        ({"eps": 1.0}, "eps .*1.0"),
        ({"budget": 0}, "budget .*0"),
        ({"shrink_expand": "both"}, "shrink_expand .*'both'"),
        ({"deff": "exact"}, "deff .*'exact'"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ink_estimate(clustered(20), **arguments)
    with pytest.raises(ValueError, match="NaN"):
        ink_estimate(np.full((3, 2), np.nan))


@pytest.mark.slow
def test_woodbury_is_far_faster_than_the_dense_form():
    """Measured 63 times at n = 600 with one thread a side; asserted at a third of that."""
    K = pairwise_kernel(clustered(600), gamma=1.0)
    stream = INKStream(1.0, 600, 0.5, "copies", "safe")
    rng = np.random.RandomState(0)
    fast = dense = 0.0
    for t in range(600):
        if t % 20 == 19:  # one step in twenty also with all matrices formed
            start = time.perf_counter()
            dense_step(K[: t + 1, : t + 1], stream.indices, stream.weights, 1.0, 0.5)
            dense += 20 * (time.perf_counter() - start)
        start = time.perf_counter()
        stream.update(K[:t, t], K[t, t], rng)
        fast += time.perf_counter() - start
    assert dense > 20 * fast
