"""Nyström ridge: closed forms, solvers, weights, streams, bad input."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from sciml.kernels import NTK, NystroemRidge, NystroemRidgeClassifier, pairwise_kernel


def clustered(n=600, seed=0):
    rng = np.random.default_rng(seed)
    blob = rng.normal(0, 0.15, (n - n // 10, 2))
    X = rng.permutation(np.concatenate([blob, rng.normal(4, 3, (n // 10, 2))]))
    clean = np.sin(3 * X[:, 0]) + np.cos(2 * X[:, 1])
    return X, clean, clean + 0.3 * rng.standard_normal(n)


RANDOM_LANDMARKS = {
    "check_sample_weight_equivalence_on_dense_data": (
        "landmarks are drawn at random, so repeated rows draw others than weighted rows"
    )
}


def expected_failures(estimator):
    every_row = estimator.method == "uniform" and estimator.n_components == 50
    return {} if every_row else RANDOM_LANDMARKS


@parametrize_with_checks(
    [
        cls(**arguments)
        for cls in (NystroemRidge, NystroemRidgeClassifier)
        for arguments in ({}, {"solver": "cg"}, {"method": "uniform", "n_components": 50})
    ],
    expected_failed_checks=expected_failures,
)
@pytest.mark.filterwarnings("ignore:n_components=50")
def test_sklearn_contract(estimator, check):
    check(estimator)


def test_equals_the_dense_solution():
    X, _, y = clustered(200)
    alpha, ridge = 0.7, 1.3
    model = NystroemRidge(alpha, gamma=1.0, ridge=ridge, random_state=0).fit(X, y)
    at, w = model.component_indices_, model.nystroem_.weights_
    K = pairwise_kernel(X, gamma=1.0)
    C = K[:, at] * np.sqrt(w)
    W = np.sqrt(w)[:, None] * K[np.ix_(at, at)] * np.sqrt(w) + ridge * np.eye(len(at))
    sketch = C @ np.linalg.solve(W, C.T)
    dense = sketch @ np.linalg.solve(sketch + alpha * np.eye(200), y)
    np.testing.assert_allclose(model.predict(X), dense, atol=1e-10)
    # and both forms of the Woodbury identity
    beta = np.linalg.solve(C.T @ C + alpha * W, C.T @ y)
    np.testing.assert_allclose(model.predict(X), C @ beta, atol=1e-9)
    w_tilde = (y - C @ beta) / alpha
    np.testing.assert_allclose(C @ np.linalg.solve(W, C.T @ w_tilde), C @ beta, atol=1e-8)


@pytest.mark.parametrize("kernel", ["rbf", NTK(depth=1)])
@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_all_rows_as_landmarks_is_kernel_ridge(kernel, solver):
    X, _, y = clustered(150)
    exact = KernelRidge(alpha=0.5, kernel=kernel, gamma=1.0).fit(X, y).predict(X)
    model = NystroemRidge(
        0.5, kernel=kernel, gamma=1.0, landmarks=np.arange(150), solver=solver, tol=1e-10
    ).fit(X, y)
    np.testing.assert_allclose(model.predict(X), exact, atol=1e-6)


@pytest.mark.parametrize("method", ["squeak", "uniform", "bless", "recursive"])
def test_cg_equals_direct(method):
    X, _, y = clustered(800)
    options = {
        "gamma": 1.0,
        "method": method,
        "n_components": 60,
        "random_state": 0,
    }
    direct = NystroemRidge(0.1, **options).fit(X, np.stack([y, y**2], axis=1))
    cg = NystroemRidge(0.1, solver="cg", tol=1e-9, **options).fit(X, np.stack([y, y**2], axis=1))
    np.testing.assert_allclose(cg.predict(X), direct.predict(X), atol=1e-5)
    assert cg.residual_ <= 1e-9
    assert 1 <= cg.n_iter_ < 60


def test_cg_warns_when_it_stops_early():
    X, _, y = clustered(300)
    model = NystroemRidge(1e-6, gamma=1.0, solver="cg", max_iter=1, tol=1e-12, random_state=0)
    with pytest.warns(ConvergenceWarning, match="max_iter=1"):
        model.fit(X, y)
    assert model.residual_ > 1e-12


def test_large_problems_recompute_their_tiles(monkeypatch):
    import sciml.kernels.nystroem_ridge as module

    X, _, y = clustered(3000)
    kept = NystroemRidge(gamma=1.0, solver="cg", random_state=0).fit(X, y)
    monkeypatch.setattr(module, "_CACHE_BYTES", 0)
    again = NystroemRidge(gamma=1.0, solver="cg", random_state=0).fit(X, y)
    np.testing.assert_allclose(kept.predict(X), again.predict(X), atol=1e-8)


@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_weights_are_repetition_for_the_same_landmarks(solver):
    X, _, y = clustered(100)
    weight = np.random.default_rng(0).integers(0, 4, 100)
    options = {"gamma": 1.0, "landmarks": X[:30], "solver": solver, "tol": 1e-10}
    weighted = NystroemRidge(0.5, **options).fit(X, y, sample_weight=weight)
    repeated = NystroemRidge(0.5, **options).fit(np.repeat(X, weight, 0), np.repeat(y, weight))
    np.testing.assert_allclose(weighted.predict(X), repeated.predict(X), atol=1e-7)


def test_rows_of_weight_zero_do_not_exist():
    X, _, y = clustered(200)
    weight = (np.arange(200) % 2).astype(float)
    half = NystroemRidge(gamma=1.0, random_state=0).fit(X[1::2], y[1::2])
    weighted = NystroemRidge(gamma=1.0, random_state=0).fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(weighted.predict(X), half.predict(X), atol=1e-10)


def test_targets_are_independent():
    X, clean, y = clustered(200)
    both = NystroemRidge(gamma=1.0, random_state=0).fit(X, np.stack([y, clean], axis=1))
    for i, target in enumerate((y, clean)):
        one = NystroemRidge(gamma=1.0, random_state=0).fit(X, target)
        np.testing.assert_allclose(both.predict(X)[:, i], one.predict(X), atol=1e-10)


def test_risk_bound():
    """Fixed-design risk within (1 + (ridge/alpha)/(1 - eps))^2 of exact regression."""
    X, clean, _ = clustered(300)
    K = pairwise_kernel(X, gamma=1.0)
    noise, alpha, ridge = 0.3, 1.0, 1.0
    model = NystroemRidge(alpha, gamma=1.0, ridge=ridge, budget=200, random_state=0).fit(X, clean)

    def risk(matrix):
        smoother = matrix @ np.linalg.inv(matrix + alpha * np.eye(300))
        bias = np.square((np.eye(300) - smoother) @ clean).mean()
        return bias + noise**2 * np.square(smoother).sum() / 300

    Z = model.nystroem_.transform(X)
    eps = 1 - ridge / np.linalg.eigvalsh(K - Z @ Z.T).max()  # from the guarantee backwards
    bound = (1 + (ridge / alpha) / (1 - min(max(eps, 0.0), 0.9))) ** 2
    assert risk(Z @ Z.T) <= bound * risk(K)
    assert risk(Z @ Z.T) <= 2 * risk(K)


def test_stream_with_fixed_landmarks_of_a_batch():
    """While no landmark is replaced, a stream and a batch have the same statistics."""
    X, _, y = clustered(60)
    options = {"gamma": 1.0, "method": "uniform", "n_components": 60, "random_state": 0}
    stream = NystroemRidge(0.5, **options)
    for i in range(0, 60, 20):
        stream.partial_fit(X[i : i + 20], y[i : i + 20])
    exact = KernelRidge(alpha=0.5, kernel="rbf", gamma=1.0).fit(X, y)
    # Past rows see new landmarks through the old ones; here rows 0..19 span most of the space.
    assert np.abs(stream.predict(X) - exact.predict(X)).mean() < 0.1


def test_stream_approaches_the_batch():
    X, clean, y = clustered(2000)
    batch = NystroemRidge(0.5, gamma=1.0, random_state=0).fit(X, y)
    stream = NystroemRidge(0.5, gamma=1.0, random_state=0)
    for i in range(0, 2000, 100):
        stream.partial_fit(X[i : i + 100], y[i : i + 100])
    errors = [np.square(model.predict(X) - clean).mean() for model in (batch, stream)]
    assert errors[1] < 1.5 * errors[0]
    assert stream.nystroem_.n_samples_seen_ == 2000


def test_stream_resumes_bit_identically():
    X, _, y = clustered(600)
    whole = NystroemRidge(0.5, gamma=1.0, random_state=0)
    parts = NystroemRidge(0.5, gamma=1.0, random_state=0)
    for i in range(0, 600, 100):
        whole.partial_fit(X[i : i + 100], y[i : i + 100])
        parts = pickle.loads(pickle.dumps(parts))
        parts.partial_fit(X[i : i + 100], y[i : i + 100])
    np.testing.assert_array_equal(whole.predict(X), parts.predict(X))


def test_fit_then_partial_fit_goes_on():
    X, _, y = clustered(400)
    model = NystroemRidge(gamma=1.0, random_state=0).fit(X[:300], y[:300])
    before = model.score(X, y)
    model.partial_fit(X[300:], y[300:])
    assert model.nystroem_.n_samples_seen_ == 400
    assert model.score(X, y) > before - 0.02


def test_classifier_on_digits():
    X, y = load_digits(return_X_y=True)
    X = X / 16
    model = NystroemRidgeClassifier(0.1, gamma=0.5, random_state=0).fit(X[:1200], y[:1200])
    assert model.score(X[1200:], y[1200:]) > 0.93
    assert model.decision_function(X[:3]).shape == (3, 10)
    stream = NystroemRidgeClassifier(0.1, gamma=0.5, random_state=0)
    for i in range(0, 1200, 300):
        stream.partial_fit(X[i : i + 300], y[i : i + 300], classes=np.arange(10))
    assert stream.score(X[1200:], y[1200:]) > 0.9
    two = y < 2
    binary = NystroemRidgeClassifier(0.1, gamma=0.5, random_state=0).fit(X[two], y[two])
    assert binary.decision_function(X[two]).ndim == 1
    assert binary.score(X[two], y[two]) == 1


def test_grid_search_on_diabetes():
    X, y = load_diabetes(return_X_y=True)
    search = GridSearchCV(
        NystroemRidge(gamma=10.0, random_state=0), {"alpha": [0.01, 1.0]}, cv=3
    ).fit(X, y - y.mean())
    assert search.best_score_ > 0.35


def test_torch_tensors_stay_torch():
    X, _, y = clustered(300)
    for solver in ("direct", "cg"):
        options = {"gamma": 1.0, "random_state": 0, "solver": solver}
        reference = NystroemRidge(**options).fit(X, y).predict(X)
        model = NystroemRidge(**options).fit(torch.as_tensor(X), torch.as_tensor(y))
        got = model.predict(torch.as_tensor(X))
        assert isinstance(got, torch.Tensor)
        np.testing.assert_allclose(got.numpy(), reference, atol=1e-8)
    labels = torch.as_tensor(y > 0)
    classifier = NystroemRidgeClassifier(gamma=1.0, random_state=0).fit(torch.as_tensor(X), labels)
    assert classifier.score(torch.as_tensor(X), labels.numpy()) > 0.85


def test_float32_stays_float32():
    X, _, y = clustered(300)
    model = NystroemRidge(gamma=1.0, random_state=0).fit(X.astype(np.float32), y)
    assert model.predict(X.astype(np.float32)).dtype == np.float32
    double = NystroemRidge(gamma=1.0, random_state=0).fit(X, y)
    assert np.abs(model.predict(X.astype(np.float32)) - double.predict(X)).mean() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha .*0.0"),
        ({"solver": "lu"}, "solver .*'direct'.*'lu'"),
        ({"tol": 0.0}, "tol .*0.0"),
        ({"max_iter": 0}, "max_iter .*0"),
        ({"ridge": -1.0}, "ridge .*-1.0"),
        ({"kernel": "precomputed"}, "kernel must be a function of points"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    X, _, y = clustered(50)
    with pytest.raises(ValueError, match=message):
        NystroemRidge(**arguments).fit(X, y)


def test_bad_data_is_named():
    X, _, y = clustered(50)
    with pytest.raises(ValueError, match="NaN"):
        NystroemRidge().fit(X, np.where(y > 0, np.nan, y))
    with pytest.raises(ValueError, match="sample_weight must be positive for at least one"):
        NystroemRidge().fit(X, y, sample_weight=np.zeros(50))
    with pytest.raises(ValueError, match="[Nn]egative"):
        NystroemRidge().fit(X, y, sample_weight=-np.ones(50))
    with pytest.raises(ValueError, match="inconsistent"):
        NystroemRidge().fit(X, y[:10])
    with pytest.raises(AttributeError, match="partial_fit"):
        NystroemRidge(solver="cg").partial_fit(X, y)
    with pytest.raises(ValueError, match="y must have 1 targets, got 2"):
        NystroemRidge().partial_fit(X, y).partial_fit(X, np.stack([y, y], 1))
    labels = y > 0
    with pytest.raises(ValueError, match="at least two classes"):
        NystroemRidgeClassifier().fit(X, np.zeros(50, int))
    with pytest.raises(ValueError, match="classes must be passed"):
        NystroemRidgeClassifier().partial_fit(X, labels)
    with pytest.raises(ValueError, match="labels among classes, got"):
        NystroemRidgeClassifier().partial_fit(X, labels.astype(int) + 5, classes=[0, 1])
