"""Nyström ridge: closed forms, solvers, weights, streams, bad input."""

import pickle

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.datasets import load_diabetes, load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from sciml.kernels import NTK, NystroemRidge, NystroemRidgeClassifier, pairwise_kernel
from sciml.kernels.landmark_factor import carry_matrix, factor_landmarks
from sciml.kernels.preconditioned_cg import preconditioned_cg


def clustered(n=600, seed=0):
    rng = np.random.default_rng(seed)
    blob = rng.normal(0, 0.15, (n - n // 10, 2))
    X = rng.permutation(np.concatenate([blob, rng.normal(4, 3, (n // 10, 2))]))
    clean = np.sin(3 * X[:, 0]) + np.cos(2 * X[:, 1])
    return X, clean, clean + 0.3 * rng.standard_normal(n)


# All rows of the checks become landmarks, so that weights are repetition to rounding.
@parametrize_with_checks(
    [
        NystroemRidge(),
        NystroemRidge(solver="cg", tol=1e-10),
        NystroemRidge(method="uniform", n_components=50),
        NystroemRidgeClassifier(),
        NystroemRidgeClassifier(solver="cg", tol=1e-10),
        # Without an intercept, far from all heavy rows a light one still decides the sign: the
        # check of class weights has noise of scale 20, which the kernel must span.
        NystroemRidgeClassifier(method="uniform", n_components=50, gamma=1e-3),
    ],
)
@pytest.mark.filterwarnings("ignore:n_components=50")
def test_sklearn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("method", ["squeak", "ink", "bless", "exact", "uniform", "recursive"])
@pytest.mark.parametrize("weighted", [False, True])
def test_regularized_form_equals_the_dense_solution(method, weighted):
    """f = K~ (K~ + alpha I)^{-1} y = C beta = C W^{-1} C' w~, all by their definitions."""
    X, _, y = clustered(200)
    alpha, ridge = 0.7, 1.3
    c = np.random.default_rng(1).integers(0, 4, 200) if weighted else np.ones(200)
    options = {"gamma": 1.0, "ridge": ridge, "method": method, "random_state": 0}
    model = NystroemRidge(alpha, approximation="regularized", **options)
    model.fit(X, y, sample_weight=c if weighted else None)
    at, s = model.component_indices_, np.sqrt(model.weights_)
    np.testing.assert_array_equal(model.components_, X[at])
    K = pairwise_kernel(X, gamma=1.0)
    C = np.sqrt(c)[:, None] * K[:, at] * s
    W = s[:, None] * K[np.ix_(at, at)] * s + ridge * np.eye(len(at))
    sketch = C @ np.linalg.solve(W, C.T)
    target = np.sqrt(c) * y
    w_tilde = np.linalg.solve(sketch + alpha * np.eye(200), target)
    beta = np.linalg.solve(C.T @ C + alpha * W, C.T @ target)
    got = np.sqrt(c) * model.predict(X)
    np.testing.assert_allclose(got, sketch @ w_tilde, atol=1e-10)
    np.testing.assert_allclose(got, C @ beta, atol=1e-10)
    np.testing.assert_allclose(got, C @ np.linalg.solve(W, C.T @ w_tilde), atol=1e-10)
    np.testing.assert_allclose(w_tilde, (target - C @ beta) / alpha, atol=1e-9)
    np.testing.assert_allclose(model.dual_coef_, s * beta, atol=1e-9)


@pytest.mark.parametrize("method", ["squeak", "ink", "bless", "exact", "uniform", "recursive"])
@pytest.mark.parametrize("weighted", [False, True])
def test_projected_form_equals_the_dense_solution(method, weighted):
    X, _, y = clustered(200)
    c = np.random.default_rng(1).integers(0, 4, 200) if weighted else np.ones(200)
    model = NystroemRidge(0.7, gamma=20.0, method=method, n_components=20, random_state=0)
    model.fit(X, y, sample_weight=c if weighted else None)
    at = model.component_indices_
    np.testing.assert_array_equal(model.components_, X[at])
    assert (c[at] > 0).all()
    K = pairwise_kernel(X, gamma=20.0)
    C = np.sqrt(c)[:, None] * K[:, at]
    sketch = C @ np.linalg.pinv(K[np.ix_(at, at)], hermitian=True, rcond=1e-12) @ C.T
    dense = sketch @ np.linalg.solve(sketch + 0.7 * np.eye(200), np.sqrt(c) * y)
    np.testing.assert_allclose(np.sqrt(c) * model.predict(X), dense, atol=1e-6)


def test_small_ridge_and_all_rows_is_kernel_ridge():
    """The regularised form too, in the limit: budget so large that every row stays."""
    X, _, y = clustered(100)
    X = 10 * X  # rows far apart, all scores near 1
    exact = KernelRidge(alpha=0.5, kernel="rbf", gamma=1.0).fit(X, y).predict(X)
    model = NystroemRidge(
        0.5, gamma=1.0, ridge=1e-9, budget=1000, approximation="regularized", random_state=0
    ).fit(X, y)
    assert len(model.components_) == 100
    np.testing.assert_allclose(model.predict(X), exact, atol=1e-6)


@pytest.mark.parametrize("kernel", ["rbf", NTK(depth=1)])
@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_all_rows_as_landmarks_is_kernel_ridge(kernel, solver):
    X, _, y = clustered(150)
    exact = KernelRidge(alpha=0.5, kernel=kernel, gamma=1.0).fit(X, y).predict(X)
    model = NystroemRidge(
        0.5, kernel=kernel, gamma=1.0, landmarks=np.arange(150), solver=solver, tol=1e-10
    ).fit(X, y)
    np.testing.assert_allclose(model.predict(X), exact, atol=1e-6)


@pytest.mark.parametrize("approximation", ["projected", "regularized"])
@pytest.mark.parametrize("method", ["squeak", "uniform", "bless", "recursive"])
def test_cg_equals_direct(method, approximation):
    X, _, y = clustered(800)
    options = {
        "gamma": 1.0,
        "method": method,
        "approximation": approximation,
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


@pytest.mark.parametrize("cache_size", [0, 1])
def test_tiles_may_be_kept_or_not(cache_size):
    """None kept, or those of the first megabyte only."""
    X, _, y = clustered(5000)
    weight = np.random.default_rng(0).random(5000)
    options = {"gamma": 1.0, "solver": "cg", "n_components": 50, "random_state": 0}
    kept = NystroemRidge(**options).fit(X, y, weight)
    again = NystroemRidge(cache_size=cache_size, **options).fit(X, y, weight)
    np.testing.assert_allclose(kept.predict(X), again.predict(X), atol=1e-10)


def test_cg_needs_few_iterations():
    """The preconditioner is the system as the landmarks see it: iterations do not grow with n."""
    counts = []
    for n in (1000, 4000):
        X, _, y = clustered(n)
        options = {"gamma": 1.0, "solver": "cg", "tol": 1e-8, "random_state": 0}
        counts.append(NystroemRidge(n / 1e4, ridge=1.0, **options).fit(X, y).n_iter_)
    assert max(counts) <= 40
    assert counts[1] <= counts[0] + 10


@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_weights_are_repetition_for_the_same_landmarks(solver):
    X, _, y = clustered(100)
    weight = np.random.default_rng(0).integers(0, 4, 100)
    options = {"gamma": 1.0, "landmarks": X[:30], "solver": solver, "tol": 1e-10}
    weighted = NystroemRidge(0.5, **options).fit(X, y, sample_weight=weight)
    repeated = NystroemRidge(0.5, **options).fit(np.repeat(X, weight, 0), np.repeat(y, weight))
    np.testing.assert_allclose(weighted.predict(X), repeated.predict(X), atol=1e-7)


@pytest.mark.parametrize("method", ["squeak", "bless", "uniform", "recursive", "exact"])
def test_rows_of_weight_zero_do_not_exist(method):
    X, _, y = clustered(200)
    weight = (np.arange(200) % 2).astype(float)
    options = {"gamma": 1.0, "method": method, "n_components": 20, "random_state": 0}
    half = NystroemRidge(**options).fit(X[1::2], y[1::2], np.ones(100))
    weighted = NystroemRidge(**options).fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(weighted.predict(X), half.predict(X), atol=1e-10)
    np.testing.assert_array_equal(weighted.component_indices_, 2 * half.component_indices_ + 1)


def test_weights_enter_the_choice_of_landmarks():
    """Scores are those of the weighted problem, and importance weights unbiased for it."""
    X, _, y = clustered(200)
    weight = np.where(np.arange(200) < 100, 0.05, 5.0)
    total, heavy = [], []
    for seed in range(40):
        model = NystroemRidge(gamma=1.0, ridge=3.0, budget=5, random_state=seed)
        model.fit(X, y, sample_weight=weight)
        total.append(model.weights_.sum())
        heavy.append((model.component_indices_ >= 100).mean())
    error = np.std(total) / np.sqrt(40)
    assert abs(np.mean(total) - weight.sum()) < 4 * error < 0.25 * weight.sum()
    assert np.mean(heavy) > 0.8


def test_targets_are_independent():
    X, clean, y = clustered(200)
    both = NystroemRidge(gamma=1.0, random_state=0).fit(X, np.stack([y, clean], axis=1))
    for i, target in enumerate((y, clean)):
        one = NystroemRidge(gamma=1.0, random_state=0).fit(X, target)
        np.testing.assert_allclose(both.predict(X)[:, i], one.predict(X), atol=1e-10)


@pytest.mark.parametrize("approximation", ["projected", "regularized"])
def test_risk_bound(approximation):
    """Fixed-design risk within (1 + (ridge/alpha)/(1 - eps))^2 of exact regression."""
    X, clean, _ = clustered(300)
    K = pairwise_kernel(X, gamma=1.0)
    noise, alpha, ridge = 0.3, 1.0, 1.0
    options = {"gamma": 1.0, "ridge": ridge, "budget": 400, "random_state": 0}
    # Predictions of unit vectors are the smoother of the model itself.
    model = NystroemRidge(alpha, approximation=approximation, **options).fit(X, np.eye(300))
    smoother = model.predict(X)
    values, vectors = np.linalg.eigh(K)
    psi = vectors * np.sqrt(np.maximum(values, 0) / (values + ridge))  # P = psi' psi, rotated
    S2 = np.zeros(300)
    S2[model.component_indices_] = model.weights_
    eps = np.abs(np.linalg.eigvalsh(psi.T @ ((1 - S2)[:, None] * psi))).max()
    assert eps < 0.7

    def risk(smoother):
        bias = np.square((np.eye(300) - smoother) @ clean).mean()
        return bias + noise**2 * np.square(smoother).sum() / 300

    exact = K @ np.linalg.inv(K + alpha * np.eye(300))
    assert risk(smoother) <= (1 + (ridge / alpha) / (1 - eps)) ** 2 * risk(exact)
    # The bound, at least 4, is far from tight, above all for the projection.
    assert risk(smoother) <= (1.01 if approximation == "projected" else 2) * risk(exact)


def test_regularized_is_below_projected_is_below_exact():
    """In the order of matrices; both within ridge/(1 - eps) of K, hence the same guarantee."""
    X = np.random.default_rng(0).standard_normal((200, 5))
    K = pairwise_kernel(X, gamma=0.2)
    sketches = {}
    for form in ("regularized", "projected"):
        model = NystroemRidge(gamma=0.2, budget=10, approximation=form, random_state=0)
        # With alpha so large that it rules, alpha times the predictions of units are K~.
        model.set_params(alpha=1e9, ridge=1.0).fit(X, np.eye(200))
        sketches[form] = 1e9 * model.predict(X)
    steps = (sketches["projected"] - sketches["regularized"], K - sketches["projected"])
    for step in steps:
        assert np.linalg.eigvalsh(step).min() > -1e-4
    gaps = {form: np.linalg.eigvalsh(K - sketch).max() for form, sketch in sketches.items()}
    assert gaps["projected"] < 0.5 * gaps["regularized"] < 0.5 * 1 / (1 - 0.5)


def test_risk_is_below_that_of_uniform_landmarks():
    """At equal m on clustered data, the medians of five seeds."""
    rng = np.random.default_rng(0)
    X = rng.permutation(np.concatenate([rng.normal(0, 0.15, (540, 2)), rng.normal(4, 3, (60, 2))]))
    clean = np.sin(X[:, 0]) + np.cos(X[:, 1])
    y = clean + 0.3 * rng.standard_normal(600)
    risks = {"squeak": [], "uniform": []}
    for seed in range(5):
        m = None
        for method in risks:
            model = NystroemRidge(gamma=1.0, method=method, n_components=m, random_state=seed)
            model.fit(X, y)
            m = len(model.components_)
            risks[method].append(np.square(model.predict(X) - clean).mean())
    assert np.median(risks["squeak"]) < 0.5 * np.median(risks["uniform"])


@pytest.mark.parametrize("approximation", ["projected", "regularized"])
@pytest.mark.parametrize("weighted", [False, True])
def test_stream_is_the_batch_while_landmarks_stay(weighted, approximation):
    X, _, y = clustered(300)
    weight = np.random.default_rng(0).integers(0, 3, 300) if weighted else np.ones(300)
    options = {"gamma": 1.0, "landmarks": X[:40], "approximation": approximation}
    stream = NystroemRidge(0.5, **options)
    for i in range(0, 300, 50):
        stream.partial_fit(X[i : i + 50], y[i : i + 50], weight[i : i + 50])
    batch = NystroemRidge(0.5, **options).fit(X, y, weight)
    np.testing.assert_allclose(stream.predict(X), batch.predict(X), atol=1e-8)
    assert stream.n_samples_seen_ == 300


def test_change_of_landmarks_keeps_what_it_promises():
    """Columns that stay are exact; a new one errs by at most sqrt(ridge/(1-eps)) ||u - P u||."""
    X, _, _ = clustered(400)
    past, K, ridge = X[:300], pairwise_kernel(X[:300], gamma=1.0), 1.0
    old = NystroemRidge(gamma=1.0, ridge=ridge, random_state=0).fit(past, np.zeros(300))
    # A third of the dictionary, to have an error that shows.
    at, s = old.component_indices_[::3], np.sqrt(old.weights_)[::3]
    new = np.concatenate([at[::2], np.arange(300, 330)])  # half stay, 30 are new
    cross = pairwise_kernel(X[at], X[new], gamma=1.0)
    first = factor_landmarks(K[np.ix_(at, at)], s**2, ridge)
    second = factor_landmarks(pairwise_kernel(X[new], gamma=1.0), np.ones(len(new)), ridge)
    move = carry_matrix(first, at, second, new, K[np.ix_(at, at)], cross)
    carried = (second.lower @ move @ first.features(K[:, at].T)).T  # kernel values, 300 x m_new
    true = pairwise_kernel(past, X[new], gamma=1.0)
    stay = len(at[::2])
    np.testing.assert_allclose(carried[:, :stay], true[:, :stay], atol=1e-10)
    inverse = np.linalg.pinv(K[np.ix_(at, at)], hermitian=True, rcond=1e-12)
    distance = np.sqrt(np.maximum(1 - np.einsum("ij,ik,kj->j", cross, inverse, cross), 0))
    energy = np.linalg.eigvalsh(K - K[:, at] @ inverse @ K[at]).max()
    whole = old.component_indices_
    inverse = np.linalg.pinv(K[np.ix_(whole, whole)], hermitian=True, rcond=1e-12)
    accurate = np.linalg.eigvalsh(K - K[:, whole] @ inverse @ K[whole]).max()
    assert accurate < ridge / (1 - 0.5)  # what `energy` is bounded by for the whole
    error = np.linalg.norm(carried - true, axis=0)[stay:]
    assert (error <= np.sqrt(energy) * distance[stay:] + 1e-6).all()
    assert error.max() > 0.01  # there is something to bound


@pytest.mark.parametrize("approximation", ["projected", "regularized"])
def test_stream_approaches_the_batch(approximation):
    X, clean, y = clustered(2000)
    options = {"gamma": 1.0, "approximation": approximation, "random_state": 0}
    batch = NystroemRidge(0.5, **options).fit(X, y)
    stream = NystroemRidge(0.5, **options)
    for i in range(0, 2000, 100):
        stream.partial_fit(X[i : i + 100], y[i : i + 100])
    errors = [np.square(model.predict(X) - clean).mean() for model in (batch, stream)]
    assert errors[1] < 1.2 * errors[0]
    assert stream.n_samples_seen_ == 2000


def test_stream_resumes_bit_identically():
    X, _, y = clustered(600)
    whole = NystroemRidge(0.5, gamma=1.0, random_state=0)
    parts = NystroemRidge(0.5, gamma=1.0, random_state=0)
    for i in range(0, 600, 100):
        whole.partial_fit(X[i : i + 100], y[i : i + 100])
        parts = pickle.loads(pickle.dumps(parts))
        parts.partial_fit(X[i : i + 100], y[i : i + 100])
    np.testing.assert_array_equal(whole.predict(X), parts.predict(X))


@pytest.mark.parametrize("method", ["squeak", "ink", "uniform"])
def test_fit_then_partial_fit_goes_on(method):
    X, _, y = clustered(400)
    weight = (np.arange(400) % 3 > 0).astype(float)
    model = NystroemRidge(gamma=1.0, method=method, random_state=0).fit(X[:300], y[:300])
    before = model.score(X, y)
    model.partial_fit(X[300:], y[300:], weight[300:])
    model.partial_fit(X[:5], y[:5], np.zeros(5))  # rows that do not count, but are seen
    assert model.n_samples_seen_ == 405
    at = model.component_indices_
    np.testing.assert_array_equal(model.components_, X[at])
    assert (weight[at[at >= 300]] > 0).all()
    assert model.score(X, y) > before - 0.02


def test_ink_may_come_back_to_a_row_that_a_limit_left_out():
    X, _, y = clustered(600)
    weight = (np.arange(600) % 4 > 0).astype(float)
    model = NystroemRidge(gamma=1.0, method="ink", n_components=20, random_state=0)
    rows = [set()]
    for at in (slice(0, 300), slice(300, 450), slice(450, 600)):
        model.partial_fit(X[at], y[at], weight[at])
        rows.append(set(model.component_indices_.tolist()))
        np.testing.assert_array_equal(model.components_, X[model.component_indices_])
        assert (weight[model.component_indices_] > 0).all()
    assert any(i < 300 for i in rows[3] - rows[2])


def test_interrupted_call_leaves_the_model_as_it_was(monkeypatch):
    X, _, y = clustered(400)
    model = NystroemRidge(gamma=1.0, random_state=0).partial_fit(X[:200], y[:200])
    expected = pickle.loads(pickle.dumps(model)).partial_fit(X[200:], y[200:]).predict(X)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NystroemRidge, "_solve", interrupt)  # the last thing that can go wrong
        with pytest.raises(KeyboardInterrupt):
            model.partial_fit(X[200:], y[200:])
    assert model.n_samples_seen_ == 200
    np.testing.assert_array_equal(model.partial_fit(X[200:], y[200:]).predict(X), expected)


def test_stream_refuses_other_parameters():
    X, _, y = clustered(200)
    model = NystroemRidge(0.5, gamma=1.0, ridge=1.0, random_state=0).partial_fit(X, y)
    model.set_params(alpha=5.0).partial_fit(X[:0:-1], y[:0:-1])  # statistics do not know alpha
    for name, value in (("gamma", 2.0), ("ridge", 0.1), ("eps", 0.2), ("landmarks", X[:5])):
        changed = pickle.loads(pickle.dumps(model)).set_params(**{name: value})
        with pytest.raises(ValueError, match=f"{name}.* must stay"):
            changed.partial_fit(X, y)
    solved = NystroemRidge(solver="cg", random_state=0).fit(X, y).set_params(solver="direct")
    with pytest.raises(ValueError, match="solver must be 'direct' in the fit"):
        solved.partial_fit(X, y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_memory_maps_are_read_like_arrays(tmp_path, dtype):
    X, _, y = clustered(3000)
    X = (100 * X).astype(dtype)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    for solver in ("direct", "cg"):
        options = {"gamma": 1e-4, "solver": solver, "random_state": 0}
        expected = NystroemRidge(**options).fit(X.astype(dtype), y)
        got = NystroemRidge(**options).fit(mapped, y)
        np.testing.assert_array_equal(got.predict(mapped[:50]), expected.predict(X[:50]))
    assert not isinstance(got.components_, np.memmap)


def test_preconditioned_cg_solves_in_rank_many_steps():
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    A = (Q * np.repeat([1.0, 10.0, 100.0], 10)) @ Q.T  # three eigenvalues: three steps
    b = np.column_stack([rng.standard_normal((30, 2)), np.zeros(30)])
    plain = preconditioned_cg(lambda v: A @ v, b, lambda v: v, tol=1e-10)
    np.testing.assert_allclose(plain.x, np.linalg.solve(A, b), atol=1e-9)
    assert plain.n_iter == 3
    exact = preconditioned_cg(lambda v: A @ v, b, lambda v: np.linalg.solve(A, v), tol=1e-10)
    assert exact.n_iter == 1
    assert exact.residual <= 1e-10


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


def test_class_weight_is_sample_weight():
    X, clean, _ = clustered(200)
    y = np.where(clean > 1.2, "rare", "common")
    own = {"rare": 3.0, "common": 0.5}
    by_class = NystroemRidgeClassifier(gamma=1.0, class_weight=own, random_state=0).fit(X, y)
    weight = np.where(y == "rare", 3.0, 0.5)
    by_row = NystroemRidgeClassifier(gamma=1.0, random_state=0).fit(X, y, weight)
    np.testing.assert_array_equal(by_class.decision_function(X), by_row.decision_function(X))
    balanced = NystroemRidgeClassifier(gamma=1.0, class_weight="balanced", random_state=0)
    assert set(balanced.fit(X, y).predict(X)) == {"rare", "common"}
    with pytest.raises(ValueError, match="class_weight must not be 'balanced'"):
        balanced.partial_fit(X, y)
    stream = NystroemRidgeClassifier(gamma=1.0, class_weight=own, random_state=0)
    stream.partial_fit(X, y, classes=["common", "rare"])
    np.testing.assert_allclose(stream.decision_function(X), by_row.decision_function(X), atol=1e-10)


def test_three_classes_are_three_regressions():
    X, clean, _ = clustered(200)
    y = np.digitize(clean, [0.5, 1.2])
    model = NystroemRidgeClassifier(gamma=1.0, random_state=0).fit(X, y)
    for k in range(3):
        one = NystroemRidge(gamma=1.0, random_state=0).fit(X, np.where(y == k, 1.0, -1.0))
        np.testing.assert_allclose(model.decision_function(X)[:, k], one.predict(X), atol=1e-10)


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


def test_degenerate_data():
    """Duplicates, constant rows, rows that are zero in the kernel's space: as KernelRidge."""
    rng = np.random.default_rng(0)
    y = rng.standard_normal(60)
    for X, kernel in (
        (np.repeat(rng.standard_normal((6, 2)), 10, axis=0), "rbf"),
        (np.ones((60, 2)), "rbf"),
        (np.zeros((60, 2)), "linear"),
        (rng.standard_normal((60, 2)), "linear"),
    ):
        exact = KernelRidge(alpha=1.0, kernel=kernel, gamma=0.5).fit(X, y).predict(X)
        for solver in ("direct", "cg"):
            model = NystroemRidge(
                kernel=kernel, gamma=0.5, ridge=0.1, solver=solver, tol=1e-9, random_state=0
            )
            np.testing.assert_allclose(model.fit(X, y).predict(X), exact, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha .*0.0"),
        ({"approximation": "exact"}, "approximation .*'projected'.*'exact'"),
        ({"solver": "lu"}, "solver .*'direct'.*'lu'"),
        ({"tol": 0.0}, "tol .*0.0"),
        ({"max_iter": 0}, "max_iter .*0"),
        ({"cache_size": -1}, "cache_size .*-1"),
        ({"method": "random"}, "method .*'squeak'.*'random'"),
        ({"eps": 1.0}, "eps .*1.0"),
        ({"budget": 0}, "budget .*0"),
        ({"landmarks": [0, 50]}, r"landmarks .*\[0, 50\)"),
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
    with pytest.raises(AttributeError, match="partial_fit"):
        NystroemRidge(method="bless").partial_fit(X, y)
    with pytest.raises(TypeError, match="[Ss]parse"):
        NystroemRidge().fit(csr_array(X), y)
    with pytest.raises(ValueError, match="features"):
        NystroemRidge().partial_fit(X, y).partial_fit(X[:, :1], y)
    with pytest.raises(ValueError, match="same length"):
        NystroemRidge().fit(torch.as_tensor(X), torch.as_tensor(y[:10]))
    with pytest.raises(TypeError, match="y must be a dense array"):
        NystroemRidge().fit(X, csr_array(X))
    with pytest.raises(ValueError, match="y must have 1 or 2 dimensions"):
        NystroemRidge().fit(torch.as_tensor(X), torch.as_tensor(X)[:, :, None])
    with pytest.raises(ValueError, match="float32 or float64"):
        NystroemRidge().fit(torch.ones(5, 2, dtype=torch.int64), torch.ones(5))
    with pytest.raises(ValueError, match="y must have 1 targets, got 2"):
        NystroemRidge().partial_fit(X, y).partial_fit(X, np.stack([y, y], 1))
    labels = y > 0
    with pytest.raises(ValueError, match="at least two classes"):
        NystroemRidgeClassifier().fit(X, np.zeros(50, int))
    with pytest.raises(ValueError, match="classes must be passed"):
        NystroemRidgeClassifier().partial_fit(X, labels)
    with pytest.raises(ValueError, match="labels among classes, got"):
        NystroemRidgeClassifier().partial_fit(X, labels.astype(int) + 5, classes=[0, 1])
