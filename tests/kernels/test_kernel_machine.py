"""Kernel machines against other solvers, their optimality conditions and scikit-learn."""

import math
import pickle
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC, LinearSVR
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.estimator_checks import parametrize_with_checks

from sciml.kernels import NNGP, NTK, KernelMachineClassifier, KernelMachineRegressor
from sciml.kernels.dual_solvers import minimize_box_quadratic, minimize_logistic, solve_ridge

CLASSIFIER_LOSSES = ("hinge", "squared_hinge", "logistic", "squared")
REGRESSOR_LOSSES = ("squared", "epsilon_insensitive")
EPSILON = 0.1


@pytest.fixture(autouse=True)
def _no_warnings():
    """Every fit converges, unless the test says otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        yield


def noisy_classes(n=60, d=4, seed=0):
    """Two classes that overlap, so that coefficients of all kinds occur."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return X, np.where(X[:, 0] + 0.7 * rng.standard_normal(n) > 0, 1, -1)


def noisy_targets(n=60, d=3, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return X, np.sin(2 * X[:, 0]) + 0.2 * rng.standard_normal(n)


def digits_0_1():
    """260 training and 100 test images."""
    X, y = load_digits(n_class=2, return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = X[order] / 16, y[order]
    return X[:260], y[:260], X[260:], y[260:]


def machine(loss, **parameters):
    regressor = loss == "epsilon_insensitive"
    return (KernelMachineRegressor if regressor else KernelMachineClassifier)(
        loss=loss, **parameters
    )


def features(K):
    """Rows whose inner products are K, for solvers of linear machines."""
    values, vectors = np.linalg.eigh(K)
    return vectors * np.sqrt(np.maximum(values, 0))


def losses(f, y, loss):
    return {
        "hinge": np.maximum(0, 1 - y * f),
        "squared_hinge": np.maximum(0, 1 - y * f) ** 2,
        "logistic": np.logaddexp(0, -y * f),
        "squared": (y - f) ** 2,
        "epsilon_insensitive": np.maximum(0, np.abs(y - f) - EPSILON),
    }[loss]


def conjugate(u, y, loss, c):
    """Sum of the convex conjugates of ``c l(., y)`` at -u, +inf where u is not feasible."""
    if loss == "hinge":
        return -np.sum(y * u)
    if loss == "squared_hinge":
        return np.sum(-y * u + u**2 / (4 * c))
    if loss == "squared":
        return np.sum(-y * u + u**2 / (4 * c))
    if loss == "logistic":
        a = np.clip(y * u / c, 0, 1)
        entropy = a * np.log(np.maximum(a, 1e-300)) + (1 - a) * np.log(np.maximum(1 - a, 1e-300))
        return np.sum(c * entropy)
    return np.sum(-y * u + EPSILON * np.abs(u))


def subgradient_distance(beta, f, y, loss, c):
    """Distance of the coefficients from ``-c l'(f)``, in units of the output."""
    z = y * f
    if loss == "squared":
        return np.abs(beta / (2 * c) - (y - f)).max()
    if loss == "squared_hinge":
        return np.abs(np.maximum(1 - z, 0) - y * beta / (2 * c)).max()
    if loss == "logistic":
        return np.abs(beta / c - y / (1 + np.exp(z))).max()
    if loss == "hinge":
        a, margin = y * beta, z
        assert a.min() >= 0
        assert a.max() <= c
        out = np.where(a == 0, np.maximum(0, 1 - margin), np.abs(1 - margin))
        return np.where(a == c, np.maximum(0, margin - 1), out).max()
    r = y - f
    assert np.abs(beta).max() <= c
    inside = np.maximum(0, np.abs(r) - EPSILON)
    free = np.abs(r - EPSILON * np.sign(beta))
    bound = np.maximum(0, EPSILON - r * np.sign(beta))
    return np.where(beta == 0, inside, np.where(np.abs(beta) == c, bound, free)).max()


# ---------------------------------------------------------------- optimality


@pytest.mark.parametrize("loss", [*CLASSIFIER_LOSSES, "epsilon_insensitive"])
@pytest.mark.parametrize("C", [0.01, 1.0, 15.625, 1e4])
@pytest.mark.parametrize("kernel", [NTK(depth=2), "rbf", "linear"])
def test_optimality_conditions_and_duality_gap(loss, C, kernel):
    X, y = noisy_targets() if loss == "epsilon_insensitive" else noisy_classes()
    fitted = machine(loss, kernel=kernel, C=C).fit(X, y)
    K = fitted.kernel_(X) if not isinstance(kernel, str) else None
    if kernel == "rbf":
        K = np.exp(-((X[:, None] - X) ** 2).sum(-1) / X.shape[1])
    elif kernel == "linear":
        K = X @ X.T
    f = K @ fitted.dual_coef_
    assert fitted.kkt_residual_ <= 1e-6
    assert fitted.n_iter_ >= 1
    assert subgradient_distance(fitted.dual_coef_, f, y, loss, C) <= 1e-6
    norm = fitted.dual_coef_ @ f
    primal = norm / 2 + C * losses(f, y, loss).sum()
    dual = -norm / 2 - conjugate(fitted.dual_coef_, y, loss, C)
    assert abs(primal - dual) <= 2e-6 * max(1, abs(primal))


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge", "epsilon_insensitive"])
@pytest.mark.parametrize("C", [0.3, 20.0])
def test_equals_a_quadratic_program(loss, C):
    """The dual by a general bound-constrained solver, with beta split into its two signs."""
    X, y = noisy_targets(30) if loss == "epsilon_insensitive" else noisy_classes(30)
    fitted = machine(loss, C=C).fit(X, y)
    K = NTK()(X)
    Q = K + (np.eye(30) / (2 * C) if loss == "squared_hinge" else 0)
    epsilon = EPSILON if loss == "epsilon_insensitive" else 0.0
    bound = math.inf if loss == "squared_hinge" else C
    positive = [(0, bound if epsilon or y[i] > 0 else 0) for i in range(30)]
    negative = [(0, bound if epsilon or y[i] < 0 else 0) for i in range(30)]

    def dual(u):
        b = u[:30] - u[30:]
        g = Q @ b - y
        return b @ Q @ b / 2 - y @ b + epsilon * u.sum(), np.r_[g + epsilon, -g + epsilon]

    best = minimize(
        dual,
        np.zeros(60),
        jac=True,
        bounds=positive + negative,
        method="L-BFGS-B",
        options={"maxiter": 50000, "maxfun": 50000, "ftol": 1e-16, "gtol": 1e-9, "maxcor": 40},
    )
    b = fitted.dual_coef_
    ours = b @ Q @ b / 2 - y @ b + epsilon * np.abs(b).sum()
    assert ours <= best.fun + 1e-12 * abs(best.fun)
    np.testing.assert_allclose(K @ b, K @ (best.x[:30] - best.x[30:]), atol=2e-4)


@pytest.mark.parametrize("C", [0.3, 10.0])
def test_equals_linear_machines_on_features_of_the_kernel(C):
    """liblinear and scikit-learn solve the same problems, given rows with inner products K."""
    X, y = noisy_classes()
    K = NTK()(X)
    Phi = features(K)
    options = {"C": C, "fit_intercept": False, "max_iter": 10**6}
    peers = {
        "hinge": LinearSVC(loss="hinge", tol=1e-9, random_state=0, **options),
        "squared_hinge": LinearSVC(loss="squared_hinge", tol=1e-9, random_state=0, **options),
        "logistic": LogisticRegression(tol=1e-10, **options),
    }
    for loss, peer in peers.items():
        f = machine(loss, C=C).fit(X, y).decision_function(X)
        np.testing.assert_allclose(f, Phi @ peer.fit(Phi, y).coef_[0], atol=1e-4, err_msg=loss)
    X, y = noisy_targets()
    Phi = features(NTK()(X))
    peer = LinearSVR(epsilon=EPSILON, tol=1e-9, random_state=0, **options).fit(Phi, y)
    f = machine("epsilon_insensitive", C=C).fit(X, y).predict(X)
    np.testing.assert_allclose(f, Phi @ peer.coef_, atol=1e-4)


@pytest.mark.parametrize("C", [0.1, 5.0])
def test_hinge_equals_svc_where_its_intercept_vanishes(C):
    # Mirrored samples of an odd kernel: each loss counts twice and the intercept is 0.
    X, y = noisy_classes()
    kernel = {"kernel": "poly", "degree": 3, "gamma": 0.5, "coef0": 0.0}
    svc = SVC(C=C, tol=1e-10, **kernel).fit(np.r_[X, -X], np.r_[y, -y])
    assert abs(svc.intercept_[0]) < 1e-6
    ours = KernelMachineClassifier(C=2 * C, **kernel).fit(X, y)
    # libsvm keeps kernel values in float32, so it is no closer to the optimum than this.
    np.testing.assert_allclose(ours.decision_function(X), svc.decision_function(X), atol=5e-4)


@pytest.mark.parametrize("C", [0.05, 1.0, 1e3])
def test_squared_equals_kernel_ridge(C):
    X, y = noisy_targets()
    ridge = KernelRidge(alpha=1 / (2 * C), kernel=NTK(depth=2)).fit(X, y)
    ours = KernelMachineRegressor(NTK(depth=2), C=C).fit(X, y)
    np.testing.assert_allclose(ours.dual_coef_, ridge.dual_coef_, rtol=1e-10, atol=1e-10)
    Z = np.random.default_rng(1).standard_normal((20, X.shape[1]))
    np.testing.assert_allclose(ours.predict(Z), ridge.predict(Z), rtol=1e-10, atol=1e-10)
    weight = np.random.default_rng(2).uniform(0, 2, len(y))
    weight[:5] = 0
    ridge.fit(X, y, sample_weight=weight)
    ours.fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(ours.predict(Z), ridge.predict(Z), rtol=1e-9, atol=1e-10)
    assert not ours.dual_coef_[:5].any()


def test_limits_of_C():
    X, y, _, _ = digits_0_1()
    y = np.where(y == 1, 1, -1)
    K = NTK()(X)
    hard = KernelMachineClassifier(C=math.inf).fit(X, y)
    margin = y * hard.decision_function(X)
    support = hard.dual_coef_ != 0
    assert margin.min() >= 1 - 1e-6
    np.testing.assert_allclose(margin[support], 1, atol=1e-6)
    squared = KernelMachineClassifier(C=math.inf, loss="squared_hinge").fit(X, y)
    np.testing.assert_allclose(squared.dual_coef_, hard.dual_coef_, atol=1e-8)
    for loss in ("hinge", "squared_hinge"):
        near = KernelMachineClassifier(C=1e9, loss=loss).fit(X, y)
        np.testing.assert_allclose(near.dual_coef_, hard.dual_coef_, atol=1e-5)
    tube = KernelMachineRegressor(loss="epsilon_insensitive", C=math.inf).fit(X, y)
    assert np.abs(tube.predict(X) - y).max() <= EPSILON + 1e-6
    # Kernel regression: the interpolation.
    regression = KernelMachineClassifier(C=math.inf, loss="squared").fit(X, y)
    np.testing.assert_allclose(regression.dual_coef_, np.linalg.solve(K, y), atol=1e-6)
    # Nearly no data: every sample at its bound.
    weak = KernelMachineClassifier(C=1e-4).fit(X, y)
    np.testing.assert_array_equal(weak.dual_coef_, 1e-4 * y)


def test_ridgeless_singular_kernel_gives_the_least_norm():
    X = np.random.default_rng(0).standard_normal((20, 3))
    y = np.random.default_rng(1).standard_normal((20, 2))
    fitted = KernelMachineRegressor("linear", C=math.inf).fit(X, y)
    np.testing.assert_allclose(X.T @ fitted.dual_coef_, np.linalg.pinv(X) @ y, atol=1e-10)
    np.testing.assert_allclose(fitted.dual_coef_, np.linalg.pinv(X @ X.T) @ y, atol=1e-10)


@pytest.mark.parametrize("loss", CLASSIFIER_LOSSES)
def test_digits_0_and_1(loss):
    X, y, X_test, y_test = digits_0_1()
    fitted = KernelMachineClassifier(loss=loss, C=1 / 0.064).fit(X, y)
    assert fitted.score(X_test, y_test) == 1.0
    if loss == "hinge":
        assert 0 < np.abs(fitted.dual_coef_).max() <= 1 / 0.064


# ---------------------------------------------------------------- hard cases


@pytest.mark.parametrize("loss", [*CLASSIFIER_LOSSES, "epsilon_insensitive"])
@pytest.mark.parametrize("C", [1.0, 1e5])
@pytest.mark.parametrize("gamma", [1e-9, 1e-4, 1e4])
def test_ill_conditioned_kernels(loss, C, gamma):
    # Nearly constant, nearly singular and nearly diagonal; the fixture checks convergence.
    X, y = load_breast_cancer(return_X_y=True)
    X, y = StandardScaler().fit_transform(X)[:200], 2 * y[:200] - 1
    fitted = machine(loss, kernel="rbf", gamma=gamma, C=C).fit(X, y)
    assert fitted.kkt_residual_ <= 1e-6


@pytest.mark.parametrize("loss", [*CLASSIFIER_LOSSES, "epsilon_insensitive"])
def test_repeated_samples_with_contradicting_labels(loss):
    X, y = noisy_classes(20)
    X, y = np.r_[X, X, X[:5]], np.r_[y, y, -y[:5]]
    for C in (1.0, 1e4):
        fitted = machine(loss, kernel=NTK(depth=3), C=C).fit(X, y)
        out = fitted.predict(X) if loss == "epsilon_insensitive" else fitted.decision_function(X)
        np.testing.assert_allclose(out[:20], out[20:40], atol=1e-5)
        np.testing.assert_allclose(out[:5], out[40:], atol=1e-5)


@pytest.mark.parametrize("loss", [*CLASSIFIER_LOSSES, "epsilon_insensitive"])
def test_zero_rows_leave_the_others_alone(loss):
    # With b_std = 0 the kernel of a zero row vanishes: it has output 0 and moves nothing.
    X, y = noisy_classes(30)
    X0, y0 = np.r_[X, np.zeros((2, X.shape[1]))], np.r_[y, 1, -1]
    with_zeros, without = machine(loss).fit(X0, y0), machine(loss).fit(X, y)
    name = "predict" if loss == "epsilon_insensitive" else "decision_function"
    f0, f = getattr(with_zeros, name)(X0), getattr(without, name)(X)
    np.testing.assert_allclose(f0[:30], f, atol=1e-7)
    np.testing.assert_array_equal(f0[30:], 0.0)
    assert np.isfinite(with_zeros.dual_coef_).all()
    assert subgradient_distance(with_zeros.dual_coef_, f0, y0, loss, 1.0) <= 1e-6


def test_constant_zero_data_predict_zero():
    fitted = KernelMachineRegressor(loss="epsilon_insensitive").fit(np.zeros((4, 2)), np.zeros(4))
    np.testing.assert_array_equal(fitted.predict(np.ones((3, 2))), np.zeros(3))


def test_warns_when_not_converged():
    X, y = noisy_classes(200)
    with pytest.warns(ConvergenceWarning, match="tol=1e-06.*max_iter"):
        fitted = KernelMachineClassifier(loss="logistic", C=1e4, max_iter=2).fit(X, y)
    assert fitted.kkt_residual_ > 1e-6
    assert fitted.n_iter_ == 2
    X = np.r_[X, X[:1]]
    y = np.r_[y, -y[0]]
    with pytest.warns(ConvergenceWarning, match="C=inf"):
        KernelMachineClassifier(C=math.inf).fit(X, y)  # contradicting labels


# ---------------------------------------------------------------- several classes and outputs


@pytest.mark.parametrize("loss", CLASSIFIER_LOSSES)
def test_one_versus_rest_is_one_problem_a_class(loss):
    X, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])
    fitted = KernelMachineClassifier(loss=loss).fit(X, names[y])
    assert fitted.dual_coef_.shape == (150, 3)
    assert list(fitted.classes_) == list(names)
    for k in range(3):
        alone = KernelMachineClassifier(loss=loss).fit(X, np.where(y == k, 1, -1))
        assert alone.dual_coef_.shape == (150,)
        np.testing.assert_allclose(
            fitted.decision_function(X)[:, k], alone.decision_function(X), atol=1e-7
        )
    f = NTK()(X) @ fitted.dual_coef_
    np.testing.assert_allclose(fitted.decision_function(X), f, atol=1e-6)
    np.testing.assert_array_equal(fitted.predict(X), names[f.argmax(axis=1)])


@pytest.mark.parametrize("loss", REGRESSOR_LOSSES)
def test_outputs_are_fitted_one_by_one(loss):
    X, y = noisy_targets()
    Y = np.stack([y, 1000 * y[::-1], np.zeros_like(y)], axis=1)
    fitted = KernelMachineRegressor(loss=loss, C=3.0).fit(X, Y)
    assert fitted.dual_coef_.shape == Y.shape
    for k in range(3):
        alone = KernelMachineRegressor(loss=loss, C=3.0).fit(X, Y[:, k]).predict(X)
        assert alone.shape == (60,)
        np.testing.assert_allclose(fitted.predict(X)[:, k], alone, rtol=1e-8, atol=1e-8)
    assert KernelMachineRegressor(loss=loss).fit(X, Y[:, :1]).predict(X).shape == (60, 1)


def test_probabilities():
    X, y = load_iris(return_X_y=True)
    two = KernelMachineClassifier(loss="logistic").fit(X[:100], y[:100])
    f = two.decision_function(X)
    np.testing.assert_allclose(two.predict_proba(X)[:, 1], 1 / (1 + np.exp(-f)), rtol=1e-12)
    np.testing.assert_allclose(two.predict_proba(X).sum(axis=1), 1, rtol=1e-12)
    three = KernelMachineClassifier(loss="logistic").fit(X, y)
    p = 1 / (1 + np.exp(-three.decision_function(X)))
    np.testing.assert_allclose(three.predict_proba(X), p / p.sum(axis=1, keepdims=True), rtol=1e-12)
    three.dual_coef_ = -1e5 * np.abs(three.dual_coef_)  # all sigmoids underflow
    assert np.isfinite(three.predict_proba(X)).all()
    assert not hasattr(KernelMachineClassifier(), "predict_proba")


# ---------------------------------------------------------------- weights and invariances


@pytest.mark.parametrize("loss", [*CLASSIFIER_LOSSES, "epsilon_insensitive"])
def test_integer_weights_are_copies(loss):
    X, y = noisy_targets(40) if loss == "epsilon_insensitive" else noisy_classes(40)
    weight = np.random.default_rng(0).integers(0, 4, 40)
    name = "predict" if loss == "epsilon_insensitive" else "decision_function"
    weighted = machine(loss, C=2.0).fit(X, y, sample_weight=weight)
    copied = machine(loss, C=2.0).fit(X.repeat(weight, axis=0), y.repeat(weight))
    np.testing.assert_allclose(getattr(weighted, name)(X), getattr(copied, name)(X), atol=1e-7)
    assert not weighted.dual_coef_[weight == 0].any()


@pytest.mark.parametrize("loss", CLASSIFIER_LOSSES)
def test_class_weights_are_sample_weights(loss):
    X, y = noisy_classes()
    y = np.where(y == 1, "a", "b")
    own = np.random.default_rng(0).uniform(0.5, 2, len(y))
    for weight in ({"a": 3.0, "b": 0.5}, "balanced"):
        expected = compute_sample_weight(weight, y) * own
        ours = machine(loss, class_weight=weight).fit(X, y, sample_weight=own)
        reference = machine(loss).fit(X, y, sample_weight=expected)
        np.testing.assert_array_equal(ours.dual_coef_, reference.dual_coef_)
        assert np.abs(ours.dual_coef_ - machine(loss).fit(X, y).dual_coef_).max() > 0.01


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    loss=st.sampled_from(CLASSIFIER_LOSSES),
    C=st.floats(1e-3, 1e3),
    scale=st.floats(1e-2, 1e2),
)
def test_invariances(seed, loss, C, scale):
    X, y = noisy_classes(25, seed=seed)
    y[:2] = 1, -1
    K = NTK()(X)
    f = KernelMachineClassifier("precomputed", loss=loss, C=C).fit(K, y).decision_function(K)
    flipped = KernelMachineClassifier("precomputed", loss=loss, C=C).fit(K, -y)
    np.testing.assert_allclose(flipped.decision_function(K), -f, atol=1e-5)
    p = np.random.default_rng(seed).permutation(25)
    permuted = KernelMachineClassifier("precomputed", loss=loss, C=C).fit(K[np.ix_(p, p)], y[p])
    np.testing.assert_allclose(permuted.decision_function(K[:, p]), f, atol=1e-5)
    # A larger kernel is a larger C.
    scaled = KernelMachineClassifier("precomputed", loss=loss, C=C / scale).fit(scale * K, y)
    np.testing.assert_allclose(scaled.decision_function(scale * K), f, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 12),
    rank=st.integers(1, 12),
    epsilon=st.sampled_from([0.0, 0.3]),
    ridge=st.sampled_from([0.0, 0.5]),
)
def test_box_quadratic_reaches_its_optimality_conditions(seed, n, rank, epsilon, ridge):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n, min(n, rank)))
    H = A @ A.T
    linear, lower, upper = rng.standard_normal(n), -rng.uniform(0, 2, n), rng.uniform(0, 2, n)
    lower[: n // 3] = 0
    b, _, violation = minimize_box_quadratic(
        H, linear, lower, upper, diagonal=ridge, epsilon=epsilon, tol=1e-9
    )
    assert violation <= 1e-9
    assert (b >= lower).all()
    assert (b <= upper).all()
    g = H @ b + ridge * b - linear
    right = g + np.where(b >= 0, epsilon, -epsilon)
    left = g + np.where(b > 0, epsilon, -epsilon)
    assert (right[b < upper] >= -1e-8).all()
    assert (left[b > lower] <= 1e-8).all()


def test_solvers_take_float32_matrices_and_count_progress():
    X, y = noisy_classes()
    K = NTK()(X)
    seen = []
    zero, one = np.where(y > 0, 0.0, -1.0), np.where(y > 0, 1.0, 0.0)
    b32, _, _ = minimize_box_quadratic(
        K.astype(np.float32), y, zero, one, tol=1e-9, progress=seen.append
    )
    b64, _, _ = minimize_box_quadratic(K, y, zero, one, tol=1e-9)
    np.testing.assert_allclose(K @ b32, K @ b64, atol=1e-4)
    assert b32.dtype == np.float64
    assert seen == sorted(seen, reverse=True)
    assert minimize_logistic(K, y, np.ones(60), tol=1e-9)[2] <= 1e-9
    assert solve_ridge(K.astype(np.float32), y, 0.5)[1] <= 1e-9
    with pytest.raises(ValueError, match="positive semi-definite"):
        minimize_logistic(np.eye(3) - 2, np.array([1, -1, 1]), np.full(3, 1e3))


# ---------------------------------------------------------------- scikit-learn


@parametrize_with_checks(
    [KernelMachineClassifier(loss=loss) for loss in CLASSIFIER_LOSSES[:3]]
    + [KernelMachineRegressor(loss=loss) for loss in REGRESSOR_LOSSES]
    + [KernelMachineClassifier(NNGP(2), C=100.0)]
    # Without an intercept, far from all heavy samples a light one still decides the sign: the
    # check of class weights has noise of scale 20, which the kernel must span.
    + [KernelMachineClassifier("rbf", gamma=1e-3)]
    + [KernelMachineClassifier(NTK(b_std=1.0), loss="squared")]
)
def test_scikit_learn_contract(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        check(estimator)


@pytest.mark.parametrize(
    ("kernel", "parameters"),
    [
        (None, {}),
        (NTK(depth=3, b_std=0.5), {}),
        (2.0 * NTK() + NNGP(), {}),
        ("rbf", {"gamma": 0.3}),
        ("poly", {"degree": 2, "coef0": 0.5}),
        (lambda X, Y: 1 + X @ Y.T, {}),
    ],
    ids=["default", "ntk", "sum", "rbf", "poly", "function"],
)
def test_kernels_equal_their_precomputed_matrix(kernel, parameters):
    X, y = noisy_classes()
    Z = np.random.default_rng(1).standard_normal((15, X.shape[1]))
    named = KernelMachineClassifier(kernel, **parameters).fit(X, y)

    def matrix(A, B):
        if kernel == "rbf":
            return np.exp(-0.3 * ((A[:, None] - B) ** 2).sum(-1))
        if kernel == "poly":
            return (A @ B.T / 4 + 0.5) ** 2
        return (NTK() if kernel is None else kernel)(A, B)

    precomputed = KernelMachineClassifier("precomputed").fit(matrix(X, X), y)
    np.testing.assert_allclose(
        named.decision_function(Z), precomputed.decision_function(matrix(Z, X)), atol=1e-6
    )
    np.testing.assert_allclose(
        named.decision_function(Z), matrix(Z, named.X_fit_) @ named.dual_coef_, atol=1e-10
    )
    assert precomputed.X_fit_ is None
    assert precomputed.kernel_ == "precomputed"
    assert kernel is not None or isinstance(named.kernel_, NTK)


def test_works_in_pipelines_searches_and_calibration():
    X, y = load_breast_cancer(return_X_y=True)
    X, y = X[:150], y[:150]
    pipeline = make_pipeline(StandardScaler(), KernelMachineClassifier(NTK()))
    search = GridSearchCV(pipeline, {"kernelmachineclassifier__kernel__depth": [1, 3]}, cv=3)
    search.fit(X, y)
    depths = [m for m in search.cv_results_["mean_test_score"]]
    assert len(depths) == 2
    assert max(depths) > 0.93
    depth = search.best_params_["kernelmachineclassifier__kernel__depth"]
    assert search.best_estimator_[-1].kernel_.depth == depth
    assert pipeline[-1].kernel.depth == 1  # the search works on clones
    probability = CalibratedClassifierCV(pipeline, cv=3).fit(X, y).predict_proba(X)
    np.testing.assert_allclose(probability.sum(axis=1), 1)
    assert (probability.argmax(axis=1) == y).mean() > 0.93
    Z = StandardScaler().fit_transform(X)
    by_name = cross_val_score(KernelMachineClassifier(), Z, y, cv=3)
    by_matrix = cross_val_score(KernelMachineClassifier("precomputed"), NTK()(Z), y, cv=3)
    np.testing.assert_array_equal(by_name, by_matrix)


@pytest.mark.parametrize("loss", [*CLASSIFIER_LOSSES, "epsilon_insensitive"])
def test_float32_stays_and_agrees(loss):
    X, y = noisy_classes()
    wide, narrow = machine(loss).fit(X, y), machine(loss).fit(X.astype(np.float32), y)
    name = "predict" if loss == "epsilon_insensitive" else "decision_function"
    f = getattr(narrow, name)(X.astype(np.float32))
    assert f.dtype == np.float32
    assert narrow.dual_coef_.dtype == narrow.X_fit_.dtype == np.float32
    np.testing.assert_allclose(f, getattr(wide, name)(X), atol=2e-3)
    assert getattr(narrow, name)(X).dtype == np.float64


def test_pickle_clone_and_own_copy_of_the_data():
    X, y = noisy_classes()
    fitted = KernelMachineClassifier(NTK(depth=2), C=3.0).fit(X, y)
    f = fitted.decision_function(X)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.decision_function(X), f)
    assert not hasattr(clone(fitted), "dual_coef_")
    Z = X.copy()
    X[:] = 7.0
    fitted.kernel.depth = 9
    np.testing.assert_array_equal(fitted.decision_function(Z), f)


def test_same_result_on_every_run_and_a_bar_on_request(capsys):
    X, y = load_iris(return_X_y=True)
    a, b = KernelMachineClassifier().fit(X, y), KernelMachineClassifier(verbose=True).fit(X, y)
    np.testing.assert_array_equal(a.dual_coef_, b.dual_coef_)
    written = capsys.readouterr().err
    assert "3/3" in written
    assert "residual" in written


# ---------------------------------------------------------------- bad input

X_GOOD, Y_GOOD = noisy_classes(10)
X_NAN = np.where(np.arange(40).reshape(10, 4) == 7, np.nan, X_GOOD)
K_GOOD = X_GOOD @ X_GOOD.T


@pytest.mark.parametrize(
    ("parameters", "X", "y", "error", "match"),
    [
        ({}, X_GOOD, np.ones(10), ValueError, "two classes.*1 class"),
        ({}, X_GOOD, np.linspace(0, 1, 10), ValueError, "Unknown label type"),
        ({}, X_GOOD, Y_GOOD[:9], ValueError, "inconsistent"),
        ({}, X_NAN, Y_GOOD, ValueError, "NaN"),
        ({}, X_GOOD * np.inf, Y_GOOD, ValueError, "infinity|NaN"),
        ({}, X_GOOD[:, 0], Y_GOOD, ValueError, "1D array"),
        ({"C": 0.0}, X_GOOD, Y_GOOD, ValueError, "C must be in"),
        ({"C": -1.0}, X_GOOD, Y_GOOD, ValueError, "C must be in"),
        ({"C": "1"}, X_GOOD, Y_GOOD, TypeError, "C must be a real number"),
        ({"C": math.nan}, X_GOOD, Y_GOOD, ValueError, "C must be in"),
        ({"C": math.inf, "loss": "logistic"}, X_GOOD, Y_GOOD, ValueError, "C must be finite"),
        ({"loss": "huber"}, X_GOOD, Y_GOOD, ValueError, "loss must be one of"),
        ({"tol": 0.0}, X_GOOD, Y_GOOD, ValueError, "tol must be in"),
        ({"max_iter": 0}, X_GOOD, Y_GOOD, ValueError, "max_iter must be"),
        ({"kernel": "cosine"}, X_GOOD, Y_GOOD, ValueError, "kernel must be one of"),
        ({"kernel": 3}, X_GOOD, Y_GOOD, TypeError, "kernel must be"),
        ({"kernel": NTK(depth=0)}, X_GOOD, Y_GOOD, ValueError, "depth must be"),
        ({"kernel": NTK(w_std=0.0)}, X_GOOD, Y_GOOD, ValueError, "w_std must be"),
        ({"kernel": "rbf", "gamma": -1.0}, X_GOOD, Y_GOOD, ValueError, "gamma must be"),
        ({"kernel": "precomputed"}, X_GOOD, Y_GOOD, ValueError, "square.*\\(10, 4\\)"),
        ({"kernel": "precomputed"}, K_GOOD + np.tri(10), Y_GOOD, ValueError, "symmetric"),
        ({"kernel": "precomputed"}, -K_GOOD, Y_GOOD, ValueError, "semi-definite"),
        ({"kernel": lambda X, Y: X}, X_GOOD, Y_GOOD, ValueError, "shape"),
        ({"kernel": lambda X, Y: X @ Y.T / 0}, X_GOOD, Y_GOOD, ValueError, "finite"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_input(parameters, X, y, error, match):
    with pytest.raises(error, match=match):
        KernelMachineClassifier(**parameters).fit(X, y)


@pytest.mark.parametrize(
    ("parameters", "y", "error", "match"),
    [
        ({"loss": "hinge"}, Y_GOOD, ValueError, "loss must be one of"),
        ({"epsilon": -0.1}, Y_GOOD, ValueError, "epsilon must be in"),
        ({}, np.r_[np.nan, Y_GOOD[1:]], ValueError, "NaN"),
        ({"C": 0}, Y_GOOD, ValueError, "C must be in"),
        ({"kernel": "precomputed"}, Y_GOOD, ValueError, "square"),
    ],
)
def test_bad_input_to_the_regressor(parameters, y, error, match):
    with pytest.raises(error, match=match):
        KernelMachineRegressor(**parameters).fit(X_GOOD, y)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (np.ones(9), "shape"),
        (np.zeros(10), "zero"),
        (-np.ones(10), ">= 0"),
        (np.full(10, np.nan), "finite"),
        ((Y_GOOD == 1).astype(float), "1 class"),
    ],
)
def test_bad_weights(weight, match):
    with pytest.raises(ValueError, match=match):
        KernelMachineClassifier().fit(X_GOOD, Y_GOOD, sample_weight=weight)


def test_bad_input_to_prediction():
    with pytest.raises(NotFittedError):
        KernelMachineClassifier().predict(X_GOOD)
    fitted = KernelMachineClassifier().fit(X_GOOD, Y_GOOD)
    with pytest.raises(ValueError, match="NaN"):
        fitted.predict(X_NAN)
    with pytest.raises(ValueError, match="3 features"):
        fitted.predict(X_GOOD[:, :3])
    by_matrix = KernelMachineClassifier("precomputed").fit(K_GOOD, Y_GOOD)
    with pytest.raises(ValueError, match="9 features"):
        by_matrix.predict(K_GOOD[:, :9])
    with pytest.raises(AttributeError, match="predict_proba"):
        fitted.predict_proba(X_GOOD)
