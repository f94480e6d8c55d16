"""Ridge-leverage Nyström: guarantees, agreement with scikit-learn, streams, merges, bad input."""

import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from sciml.kernels import (
    NTK,
    RidgeLeverageNystroem,
    effective_dimension,
    merge,
    nystroem_map,
    pairwise_kernel,
    ridge_leverage_scores,
)
from sciml.kernels.squeak import expand, merge_dictionaries, shrink, squeak_scores

METHODS = ("squeak", "ink", "bless", "recursive", "exact", "uniform")


def clustered(n=600, seed=0):
    rng = np.random.default_rng(seed)
    blob = rng.normal(0, 0.15, (n - n // 10, 2))
    return rng.permutation(np.concatenate([blob, rng.normal(4, 3, (n // 10, 2))]))


def rbf(X, Y=None):
    return pairwise_kernel(X, Y, gamma=1.0)


def spectral_error(K, Z):
    return np.linalg.norm(K - Z @ Z.T, 2)


@parametrize_with_checks(
    [RidgeLeverageNystroem(method=method) for method in METHODS]
    + [RidgeLeverageNystroem(method="uniform", n_components=5)]
)
def test_sklearn_contract(estimator, check):
    check(estimator)


def test_all_points_kept_gives_the_exact_scores():
    X = clustered(80)
    dictionary = expand(None, X, 10)
    np.testing.assert_allclose(
        squeak_scores(dictionary, rbf, 0.5, 0.3),
        0.7 * ridge_leverage_scores(rbf(X), 0.5),
        atol=1e-10,
    )


def test_squeak_scores_bracket_the_true_ones():
    """Between tau / alpha and tau for the accuracy that the dictionary really has."""
    X = clustered(300)
    K, ridge = rbf(X), 1.0
    fitted = RidgeLeverageNystroem(gamma=1.0, budget=400, regularized=True, random_state=0).fit(X)
    values, vectors = np.linalg.eigh(K)
    Psi = (vectors * np.sqrt(np.maximum(values, 0) / (np.maximum(values, 0) + ridge))) @ vectors.T
    S = np.zeros(300)
    S[fitted.component_indices_] = fitted.weights_
    eps = np.linalg.norm(Psi @ np.diag(1 - S) @ Psi, 2)
    assert eps < 0.5
    exact = ridge_leverage_scores(K, ridge)[fitted.component_indices_]
    estimate = fitted.leverage_scores_ * (1 - eps)
    assert (estimate <= exact + 1e-9).all()
    assert (estimate >= exact * (1 - eps) / (1 + eps) - 1e-9).all()
    # and the guarantee that follows from it
    Z = fitted.transform(X)
    error = np.linalg.eigvalsh(K - Z @ Z.T)
    assert error.min() > -1e-9
    assert error.max() <= ridge / (1 - eps) + 1e-9
    # which the features without the ridge have all the more
    Y = RidgeLeverageNystroem(gamma=1.0, budget=400, random_state=0).fit_transform(X)
    assert np.linalg.eigvalsh(Y @ Y.T - Z @ Z.T).min() > -1e-9
    assert np.linalg.eigvalsh(K - Y @ Y.T).min() > -1e-9
    assert np.linalg.norm(K - Y @ Y.T, 2) < 0.5 * error.max()


def test_weights_are_unbiased_over_seeds():
    X = clustered(80)
    weights = np.zeros((300, 80))
    for seed in range(300):
        fitted = RidgeLeverageNystroem(gamma=1.0, budget=10, random_state=seed).fit(X)
        weights[seed, fitted.component_indices_] = fitted.weights_
    assert weights.mean() == pytest.approx(1, abs=0.03)
    error_of_mean = weights.std(axis=0) / np.sqrt(300) + 1e-9
    assert (np.abs(weights.mean(axis=0) - 1) / error_of_mean).max() < 5


@pytest.mark.parametrize("method", ["exact", "bless"])
def test_weights_sum_to_the_number_of_rows(method):
    X = clustered(300)
    sums = [
        RidgeLeverageNystroem(gamma=1.0, method=method, n_components=None, random_state=seed)
        .fit(X)
        .weights_.sum()
        for seed in range(30)
    ]
    assert np.mean(sums) == pytest.approx(300, rel=0.15)


@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "polynomial", "linear"])
def test_uniform_equals_scikit_learn(kernel):
    X = np.random.default_rng(0).standard_normal((200, 4))
    options = {"gamma": 0.1, "degree": 3, "coef0": 1.0}
    theirs = Nystroem(kernel, n_components=20, random_state=3, **options).fit(X)
    ours = RidgeLeverageNystroem(
        kernel, method="uniform", n_components=20, random_state=3, **options
    ).fit(X)
    assert ours.component_indices_.tolist() == theirs.component_indices_.tolist()
    Z, reference = ours.transform(X), theirs.transform(X)
    np.testing.assert_allclose(Z @ Z.T, reference @ reference.T, rtol=1e-6, atol=1e-6)
    # scikit-learn takes the symmetric root of the inverse, we the triangular one.
    if kernel in ("rbf", "laplacian"):
        np.testing.assert_array_equal(np.tril(ours.normalization_, -1), 0)
        gram = theirs.normalization_.T @ theirs.normalization_
        np.testing.assert_allclose(
            ours.normalization_.T @ ours.normalization_, gram, rtol=1e-6, atol=1e-6 * gram.max()
        )


@pytest.mark.parametrize("n_jobs", [None, 1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel", ["rbf", NTK(2), lambda X, Y: 1 + X @ Y.T])
def test_features_are_kernel_values_times_the_map(kernel, dtype, n_jobs, monkeypatch):
    monkeypatch.setattr(nystroem_map, "_TILE_ENTRIES", 64 * 20)  # several tiles, the last smaller
    X = np.random.default_rng(0).standard_normal((1000, 4)).astype(dtype)
    options = {"method": "uniform", "n_components": 20, "random_state": 0, "n_jobs": n_jobs}
    fitted = RidgeLeverageNystroem(kernel, **options).fit(X)
    expected = pairwise_kernel(X, fitted.components_, kernel) @ fitted.normalization_.T
    Z = fitted.transform(X)
    assert Z.dtype == dtype
    tolerance = 1e-4 if dtype == np.float32 else 1e-11
    np.testing.assert_allclose(Z, expected, rtol=tolerance, atol=tolerance)


def test_features_need_little_memory_besides_themselves():
    X = np.random.default_rng(0).standard_normal((20_000, 5))
    fitted = RidgeLeverageNystroem(method="uniform", random_state=0).fit(X)
    fitted.transform(X[:100])
    tracemalloc.start()
    Z = fitted.transform(X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.15 * Z.nbytes


def test_own_landmarks():
    X = clustered(100)
    at = np.array([3, 50, 7])
    by_position = RidgeLeverageNystroem(gamma=1.0, landmarks=at).fit(X)
    by_points = RidgeLeverageNystroem(gamma=1.0, landmarks=X[at]).fit(X)
    np.testing.assert_array_equal(by_position.components_, X[at])
    np.testing.assert_allclose(by_position.transform(X), by_points.transform(X))
    assert by_points.component_indices_.tolist() == [-1, -1, -1]
    K = rbf(X)
    expected = K[:, at] @ np.linalg.solve(K[np.ix_(at, at)], K[at])
    Z = by_position.transform(X)
    np.testing.assert_allclose(Z @ Z.T, expected, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_precomputed_equals_points(method):
    X = clustered(150)
    options = {"method": method, "random_state": 0, "n_components": 30}
    by_points = RidgeLeverageNystroem(gamma=1.0, **options).fit(X)
    by_matrix = RidgeLeverageNystroem("precomputed", **options).fit(rbf(X))
    assert by_matrix.component_indices_.tolist() == by_points.component_indices_.tolist()
    test = clustered(20, seed=1)
    np.testing.assert_allclose(
        by_matrix.transform(rbf(test, X)), by_points.transform(test), atol=1e-6
    )


@pytest.mark.parametrize("method", ["squeak", "uniform", "ink"])
def test_stream_resumes_bit_identically(method):
    X = clustered(700)
    make = RidgeLeverageNystroem(gamma=1.0, method=method, n_components=60, random_state=0)
    whole, parts = clone(make), clone(make)
    for block in np.split(X, 7):
        whole.partial_fit(block)
        parts = pickle.loads(pickle.dumps(parts)).partial_fit(block)
    np.testing.assert_array_equal(whole.transform(X), parts.transform(X))
    assert whole.n_samples_seen_ == 700
    np.testing.assert_array_equal(X[whole.component_indices_], whole.components_)


def test_stream_interrupted_in_the_middle_keeps_whole_blocks(monkeypatch):
    X = clustered(1024)
    estimator = RidgeLeverageNystroem(gamma=1.0, random_state=0)
    estimator.partial_fit(X[:256])
    import sciml.kernels.nystroem as module

    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return shrink(*arguments)

    monkeypatch.setattr(module, "shrink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        estimator.partial_fit(X[256:])
    monkeypatch.undo()
    assert estimator._dictionary.n_seen == 512
    estimator.partial_fit(X[512:])
    straight = RidgeLeverageNystroem(gamma=1.0, random_state=0).partial_fit(X)
    np.testing.assert_array_equal(straight.component_indices_, estimator.component_indices_)


@pytest.mark.parametrize("method", ["squeak", "ink"])
def test_interrupted_fit_is_fitted_on_the_rows_done(method, monkeypatch):
    X = clustered(700)
    import sciml.kernels.nystroem as module

    kernel_calls = []

    def interrupted(*arguments, **options):
        kernel_calls.append(1)
        if len(kernel_calls) == stop:
            raise KeyboardInterrupt
        return pairwise_kernel(*arguments, **options)

    stop = 3 if method == "squeak" else 120
    estimator = RidgeLeverageNystroem(gamma=1.0, method=method, budget=100, random_state=0)
    monkeypatch.setattr(module, "pairwise_kernel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(X)
    monkeypatch.undo()
    done = {"squeak": 512, "ink": 120}[method]
    assert estimator.n_samples_seen_ == done
    assert np.isfinite(estimator.transform(X)).all()
    estimator.partial_fit(X[done:])
    straight = clone(estimator).fit(X)
    np.testing.assert_array_equal(straight.component_indices_, estimator.component_indices_)
    np.testing.assert_array_equal(straight.transform(X), estimator.transform(X))


@pytest.mark.parametrize(
    ("name", "value"), [("ridge", 2.0), ("budget", 5), ("eps", 0.1), ("gamma", 3.0)]
)
def test_parameters_stay_within_a_stream(name, value):
    X = clustered(100)
    estimator = RidgeLeverageNystroem(gamma=1.0, random_state=0).partial_fit(X)
    estimator.set_params(**{name: value})
    with pytest.raises(ValueError, match=f"{name} must stay .* got {value}"):
        estimator.partial_fit(X)
    assert estimator.fit(X).partial_fit(X).n_samples_seen_ == 200


def test_ink_owns_the_rows_it_looks_back_at():
    X = clustered(120)
    buffer = X[:60].copy()
    estimator = RidgeLeverageNystroem(gamma=1.0, method="ink", random_state=0).partial_fit(buffer)
    buffer[:] = X[60:]
    estimator.partial_fit(buffer)
    straight = RidgeLeverageNystroem(gamma=1.0, method="ink", random_state=0).fit(X)
    np.testing.assert_array_equal(straight.component_indices_, estimator.component_indices_)


def test_fit_then_partial_fit_goes_on():
    X = clustered(512)
    on = RidgeLeverageNystroem(gamma=1.0, random_state=0).fit(X[:256]).partial_fit(X[256:])
    straight = RidgeLeverageNystroem(gamma=1.0, random_state=0).fit(X)
    np.testing.assert_array_equal(on.component_indices_, straight.component_indices_)


def test_uniform_stream_is_uniform():
    X = np.arange(40.0)[:, None]
    counts = np.zeros(40)
    for seed in range(600):
        estimator = RidgeLeverageNystroem(method="uniform", n_components=10, random_state=seed)
        for block in np.split(X, 4):
            estimator.partial_fit(block)
        counts[estimator.component_indices_] += 1
    # Binomial(600, 1/4): 150 with standard deviation 10.6
    assert np.abs(counts - 150).max() < 45


def test_merge_is_accurate_and_order_does_not_matter():
    X = clustered(900)
    K = rbf(X)
    thirds = np.split(X, 3)
    errors = {"left": [], "right": []}
    for seed in range(10):
        a, b, c = (
            RidgeLeverageNystroem(gamma=1.0, budget=40, random_state=3 * seed + i).fit(part)
            for i, part in enumerate(thirds)
        )
        left = merge(merge(a, b, random_state=seed), c, random_state=seed)
        right = merge(a, merge(b, c, random_state=seed), random_state=seed)
        for name, merged in (("left", left), ("right", right)):
            np.testing.assert_array_equal(X[merged.component_indices_], merged.components_)
            assert merged.n_samples_seen_ == 900
            errors[name].append(spectral_error(K, merged.transform(X)))
    assert max(errors["left"] + errors["right"]) < 4
    assert np.mean(errors["left"]) == pytest.approx(np.mean(errors["right"]), rel=0.25)


def test_limit_bounds_the_dictionary_at_every_moment_and_keeps_weights_unbiased():
    X = clustered(90)
    total = np.zeros(90)
    budgets = []
    for seed in range(300):
        estimator = RidgeLeverageNystroem(gamma=1.0, n_components=15, random_state=seed)
        for block in np.split(X, 3):
            estimator.partial_fit(block)
            assert len(estimator._dictionary) <= 15
        total[estimator.component_indices_] += estimator.weights_ / 300
        budgets.append(estimator._dictionary.budget)
    assert 4 <= min(budgets) <= max(budgets) < 20
    assert total.mean() == pytest.approx(1, abs=0.06)
    assert np.abs(total - 1).max() < 1


def test_a_tight_limit_is_made_use_of():
    """The effective dimension of digits is far above the limit: the ridge has to rise."""
    X = load_digits().data / 16
    X = X[np.random.default_rng(0).permutation(len(X))]
    options = {"gamma": 0.5, "ridge": 0.1, "n_components": 50}
    sizes, errors = [], {"squeak": [], "uniform": []}
    K = pairwise_kernel(X, gamma=0.5)
    for seed in range(3):
        for method, into in errors.items():
            model = RidgeLeverageNystroem(method=method, random_state=seed, **options).fit(X)
            Z = model.transform(X)
            into.append(np.trace(K) - (Z * Z).sum())
            if method == "squeak":
                sizes.append(len(model.component_indices_))
                assert model.ridge_ > 10 * model.ridge
    assert 35 < min(sizes) <= max(sizes) <= 50
    assert np.mean(errors["squeak"]) < 1.05 * np.mean(errors["uniform"])
    free = RidgeLeverageNystroem(gamma=0.5, ridge=100.0).fit(X)
    assert free.ridge_ == free.ridge


def test_points_enter_with_weight_one_after_the_budget_fell():
    X = clustered(60)
    dictionary = replace(expand(None, X[:30], 10), budget=7.3, copies=np.full(30, 8))
    dictionary = replace(dictionary, probabilities=np.full(30, 8 / 7.3))
    grown = expand(dictionary, X[30:], 10)
    np.testing.assert_allclose(grown.weights, 1)
    np.testing.assert_allclose(
        squeak_scores(grown, rbf, 0.5, 0.3), 0.7 * ridge_leverage_scores(rbf(X), 0.5), atol=1e-10
    )


def test_dictionaries_of_different_budgets_merge_unbiased():
    X = clustered(60)
    total = np.zeros(60)
    for seed in range(300):
        rng = np.random.RandomState(seed)
        halves = []
        for part, budget in ((X[:30], 10), (X[30:], 25)):
            grown = expand(None, part, budget)
            halves.append(shrink(grown, squeak_scores(grown, rbf, 1.0, 0.5), rng))
        merged = merge_dictionaries(*halves, rbf, 1.0, 0.5, rng)
        assert merged.budget == 10
        total[merged.indices] += merged.weights / 300
    assert total[:30].mean() == pytest.approx(1, abs=0.08)
    assert total[30:].mean() == pytest.approx(1, abs=0.08)


def test_merged_dictionaries_are_unbiased():
    X = clustered(60)
    total = np.zeros(60)
    for seed in range(200):
        rng = np.random.RandomState(seed)
        halves = []
        for part in (X[:30], X[30:]):
            grown = expand(None, part, 10)
            halves.append(shrink(grown, squeak_scores(grown, rbf, 1.0, 0.5), rng))
        merged = merge_dictionaries(*halves, rbf, 1.0, 0.5, rng)
        total[merged.indices] += merged.weights / 200
    assert total.mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_dask_array(scheduler):
    import dask
    import dask.array

    X = clustered(800)
    with dask.config.set(scheduler=scheduler):
        fitted = RidgeLeverageNystroem(gamma=1.0, random_state=0).fit(
            dask.array.from_array(X, chunks=(150, 2))
        )
    assert fitted.n_samples_seen_ == 800
    np.testing.assert_array_equal(X[fitted.component_indices_], fitted.components_)
    assert spectral_error(rbf(X), fitted.transform(X)) < 4
    with dask.config.set(scheduler="synchronous"):
        again = RidgeLeverageNystroem(gamma=1.0, random_state=0).fit(
            dask.array.from_array(X, chunks=(150, 1))
        )
    np.testing.assert_array_equal(again.component_indices_, fitted.component_indices_)


@pytest.mark.parametrize("wrap", [list, iter, tuple])
def test_chunks(wrap):
    X = clustered(800)
    fitted = RidgeLeverageNystroem(gamma=1.0, random_state=0).fit(wrap(np.array_split(X, 5)))
    assert fitted.n_samples_seen_ == 800
    assert spectral_error(rbf(X), fitted.transform(X)) < 4
    fitted.partial_fit(X[:10])
    assert fitted.n_samples_seen_ == 810
    with pytest.raises(ValueError, match="chunks with 2 features, got 3"):
        fitted.fit([X, np.ones((5, 3))])
    assert fitted.fit([np.ones((5, 3)), np.eye(3)]).n_features_in_ == 3


def test_memory_map(tmp_path):
    X = clustered(1000)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    a, b = (RidgeLeverageNystroem(gamma=1.0, random_state=0).fit(data) for data in (mapped, X))
    np.testing.assert_array_equal(a.component_indices_, b.component_indices_)
    assert not isinstance(a.components_, np.memmap)


def test_memory_map_of_integers_is_converted_block_by_block(tmp_path, monkeypatch):
    X = np.random.default_rng(0).integers(0, 255, (900, 3)).astype(np.uint8)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    options = {"gamma": 1e-4, "random_state": 0}
    a = RidgeLeverageNystroem(**options).partial_fit(mapped[:512]).partial_fit(mapped[512:])
    b = RidgeLeverageNystroem(**options).fit(X.astype(float))
    np.testing.assert_array_equal(a.component_indices_, b.component_indices_)
    np.testing.assert_array_equal(a.transform(mapped), b.transform(X))


def test_memory_map_with_a_late_nan_is_refused(tmp_path):
    X = clustered(900)
    X[-1, 0] = np.nan
    np.save(tmp_path / "X.npy", X)
    with pytest.raises(ValueError, match="X must be finite"):
        RidgeLeverageNystroem().fit(np.load(tmp_path / "X.npy", mmap_mode="r"))


@pytest.mark.parametrize("method", METHODS)
def test_torch_tensors_stay_torch(method):
    X = clustered(200)
    options = {"gamma": 1.0, "method": method, "n_components": 40, "random_state": 0}
    ours = RidgeLeverageNystroem(**options).fit(torch.as_tensor(X))
    Z = ours.transform(torch.as_tensor(X))
    assert isinstance(Z, torch.Tensor)
    reference = RidgeLeverageNystroem(**options).fit(X)
    assert ours.component_indices_.tolist() == reference.component_indices_.tolist()
    expected = reference.transform(X)
    # Single features differ where the kernel matrix is singular to rounding; products do not.
    np.testing.assert_allclose((Z @ Z.T).numpy(), expected @ expected.T, rtol=1e-4, atol=1e-4)


def test_dtype_and_names():
    X = clustered(100)
    fitted = RidgeLeverageNystroem(gamma=1.0, random_state=0).fit(X.astype(np.float32))
    Z = fitted.transform(X.astype(np.float32))
    assert Z.dtype == np.float32
    assert len(fitted.get_feature_names_out()) == Z.shape[1]
    frame = fitted.set_output(transform="pandas").transform(X.astype(np.float32))
    assert frame.columns[0] == "ridgeleveragenystroem0"


def test_duplicated_points_are_fine():
    X = np.repeat(clustered(50), 8, axis=0)
    for method in METHODS:
        fitted = RidgeLeverageNystroem(gamma=1.0, method=method, random_state=0).fit(X)
        Z = fitted.transform(X)
        assert np.isfinite(Z).all()
        assert spectral_error(rbf(X), Z) < 8


def test_n_components_is_a_limit():
    X = clustered(600)
    for method in METHODS:
        fitted = RidgeLeverageNystroem(
            gamma=1.0, method=method, n_components=25, random_state=0
        ).fit(X)
        assert len(fitted.component_indices_) <= 25
    thinned = [
        RidgeLeverageNystroem(gamma=1.0, n_components=40, random_state=s).fit(X).weights_.sum()
        for s in range(40)
    ]
    assert np.mean(thinned) == pytest.approx(600, rel=0.2)


def test_effective_dimension_is_estimated():
    X = clustered(600)
    exact = effective_dimension(X, 1.0, kernel="rbf", gamma=1.0)
    fitted = RidgeLeverageNystroem(gamma=1.0, budget=40, random_state=0).fit(X)
    assert fitted.effective_dimension_ == pytest.approx(exact, rel=0.25)


def test_effective_dimension_of_uniform_landmarks_counts_all_rows():
    X = np.random.default_rng(0).standard_normal((800, 2))
    exact = effective_dimension(X, 1.0, kernel="rbf", gamma=0.3)
    fitted = RidgeLeverageNystroem(gamma=0.3, method="uniform", n_components=200, random_state=0)
    assert fitted.fit(X).effective_dimension_ == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_layout_of_a_foreign_kernel_matrix_does_not_matter(method):
    X = clustered(200)

    def by_columns(A, B):
        return np.asfortranarray(rbf(A, B))

    options = {"method": method, "n_components": 30, "random_state": 0}
    a = RidgeLeverageNystroem(by_columns, **options).fit(X)
    b = RidgeLeverageNystroem(rbf, **options).fit(X)
    assert a.component_indices_.tolist() == b.component_indices_.tolist()
    np.testing.assert_allclose(a.leverage_scores_, b.leverage_scores_, atol=1e-8)


@pytest.mark.parametrize("method", ["squeak", "bless", "recursive", "exact"])
def test_small_ridge_does_not_drown_in_float32(method):
    X = clustered(1000)
    options = {"gamma": 1.0, "ridge": 1e-5, "method": method, "random_state": 0}
    single = RidgeLeverageNystroem(**options).fit(X.astype(np.float32))
    double = RidgeLeverageNystroem(**options).fit(X.astype(np.float32).astype(float))
    assert single.component_indices_.tolist() == double.component_indices_.tolist()
    assert single.normalization_.dtype == np.float32
    np.testing.assert_allclose(single.leverage_scores_, double.leverage_scores_, atol=1e-3)


@pytest.mark.parametrize("method", [*METHODS, "landmarks"])
def test_indefinite_kernels_are_refused(method):
    X = clustered(200)
    chosen = {"landmarks": np.arange(30)} if method == "landmarks" else {"method": method}
    for kernel in (lambda A, B: -rbf(A, B), lambda A, B: np.tanh(A @ B.T - 1)):
        with pytest.raises(ValueError, match="must be positive semidefinite"):
            RidgeLeverageNystroem(kernel, random_state=0, **chosen).fit(X)


def test_pipeline_search_and_kernel_objects():
    X, y = load_digits(return_X_y=True)
    X, y = X[:300] / 16, y[:300]
    pipeline = make_pipeline(RidgeLeverageNystroem(NTK(), random_state=0), Ridge())
    search = GridSearchCV(
        pipeline, {"ridgeleveragenystroem__kernel__depth": [1, 2]}, cv=2, error_score="raise"
    )
    assert search.fit(X, y).best_score_ > 0.05
    K = pairwise_kernel(X, None, NTK())
    precomputed = make_pipeline(
        RidgeLeverageNystroem("precomputed", method="uniform", random_state=0), Ridge()
    )
    assert np.isfinite(cross_val_score(precomputed, K, y, cv=3)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ridge": 0.0}, "ridge .*0.0"),
        ({"eps": 0.0}, "eps .*0.0"),
        ({"eps": 1.0}, "eps .*1.0"),
        ({"budget": 0}, "budget .*0"),
        ({"n_components": 0}, "n_components .*0"),
        ({"method": "leverage"}, "method .*'squeak'.*'leverage'"),
        ({"landmarks": [0, 100]}, r"positions in \[0, 100\)"),
        ({"landmarks": [-1]}, r"positions in \[0, 100\)"),
        ({"landmarks": [1, 1]}, "distinct"),
        ({"landmarks": [0.5]}, "integers"),
        ({"landmarks": np.ones((2, 3))}, r"\(m, 2\).*\(2, 3\)"),
        ({"landmarks": np.full((2, 2), np.nan)}, "landmarks must be finite"),
        ({"kernel": lambda X, Y: -rbf(X, Y)}, "positive semidefinite"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RidgeLeverageNystroem(**{"gamma": 1.0, **arguments}).fit(clustered(100))


def test_bad_data_is_named():
    X = clustered(50)
    with pytest.raises(ValueError, match="NaN"):
        RidgeLeverageNystroem().fit(np.where(X > 0, np.nan, X))
    with pytest.raises(TypeError, match="Sparse"):
        RidgeLeverageNystroem().fit(sparse.csr_matrix(X))
    with pytest.raises(ValueError, match="symmetric"):
        RidgeLeverageNystroem("precomputed").fit(np.triu(np.ones((4, 4))))
    with pytest.raises(ValueError, match="positive semidefinite"):
        RidgeLeverageNystroem("precomputed", ridge=0.5).fit(np.array([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="2 features"):
        RidgeLeverageNystroem().fit(X).partial_fit(np.ones((3, 5)))
    with pytest.raises(AttributeError, match="partial_fit"):
        RidgeLeverageNystroem(method="bless").partial_fit(X)
    with pytest.raises(ValueError, match="chunks with method='squeak'"):
        RidgeLeverageNystroem(method="bless").fit([X, X])
    with pytest.raises(ValueError, match="at least one chunk"):
        RidgeLeverageNystroem().fit(iter([]))
    with pytest.warns(UserWarning, match="n_components=100 is more than the 50 rows"):
        RidgeLeverageNystroem(method="uniform").fit(X)
    fitted = RidgeLeverageNystroem().fit(X)
    with pytest.raises(ValueError, match="ridge of a and b"):
        merge(fitted, RidgeLeverageNystroem(ridge=2.0).fit(X))
    with pytest.raises(ValueError, match="b must be fitted with method='squeak'"):
        merge(fitted, RidgeLeverageNystroem(method="bless").fit(X))


@pytest.mark.slow
def test_clustered_data_twice_as_accurate_as_uniform():
    """Median over 5 seeds of the spectral error at equal m, and homogeneous data."""
    X = clustered(600)
    K = rbf(X)
    for budget in (10, 20, 40):
        errors = {"squeak": [], "uniform": []}
        for seed in range(5):
            squeak = RidgeLeverageNystroem(gamma=1.0, budget=budget, random_state=seed).fit(X)
            m = len(squeak.component_indices_)
            uniform = RidgeLeverageNystroem(
                gamma=1.0, method="uniform", n_components=m, random_state=seed
            ).fit(X)
            errors["squeak"].append(spectral_error(K, squeak.transform(X)))
            errors["uniform"].append(spectral_error(K, uniform.transform(X)))
        assert np.median(errors["uniform"]) > 2 * np.median(errors["squeak"]), budget
    sphere = np.random.default_rng(0).standard_normal((600, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    K = rbf(sphere)
    errors = {"squeak": [], "uniform": []}
    for seed in range(5):
        squeak = RidgeLeverageNystroem(gamma=1.0, n_components=40, random_state=seed).fit(sphere)
        m = len(squeak.component_indices_)
        uniform = RidgeLeverageNystroem(
            gamma=1.0, method="uniform", n_components=m, random_state=seed
        ).fit(sphere)
        errors["squeak"].append(spectral_error(K, squeak.transform(sphere)))
        errors["uniform"].append(spectral_error(K, uniform.transform(sphere)))
    assert np.median(errors["squeak"]) <= 1.05 * np.median(errors["uniform"])
