import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import check_estimator

from sciml.lm import Chinchilla, DataConstrained, SoftQ

HOFFMANN = (1.69, 406.4, 410.7, 0.34, 0.28)
BESIROGLU = (1.8172, 482.01, 2085.43, 0.3478, 0.3658)
MUENNIGHOFF = (
    np.exp(0.6254804),
    np.exp(6.255414),
    np.exp(7.3049974),
    0.3526596,
    0.3526596,
    5.309743,
    15.387756,
)


def grid(params, tokens, *more):
    columns = np.meshgrid(params, tokens, *more, indexing="ij")
    return np.column_stack([column.ravel() for column in columns])


RUNS = grid([1e8, 4e8, 1.6e9, 6e9], [2e9, 1e10, 5e10])


def softq_loss(X, E, A, B, alpha, beta, q):
    return E + ((A * X[:, 0] ** -alpha) ** q + (B * X[:, 1] ** -beta) ** q) ** (1 / q)


@pytest.mark.parametrize("constants", [HOFFMANN, BESIROGLU])
def test_chinchilla_recovers_exact_losses(constants):
    E, A, B, alpha, beta = constants
    loss = E + A * RUNS[:, 0] ** -alpha + B * RUNS[:, 1] ** -beta
    law = Chinchilla().fit(RUNS, loss)
    fitted = (law.E_, law.A_, law.B_, law.alpha_, law.beta_)
    np.testing.assert_allclose(fitted, constants, rtol=1e-3)
    np.testing.assert_allclose(law.predict(RUNS), loss, rtol=1e-9)
    np.testing.assert_allclose(Chinchilla.from_parameters(*constants).predict(RUNS), loss)


def test_chinchilla_counts_every_epoch():
    law = Chinchilla.from_parameters(*BESIROGLU)
    law.n_features_in_ = 3
    repeated = law.predict([[1e9, 1e10, 4.0]])
    law.n_features_in_ = 2
    np.testing.assert_allclose(repeated, law.predict([[1e9, 4e10]]))


def test_chinchilla_finds_the_minimum_of_the_papers_grid_of_starts():
    rng = np.random.default_rng(0)
    law = Chinchilla.from_parameters(*BESIROGLU)
    log_loss = np.log(law.predict(RUNS)) + 0.01 * rng.standard_normal(len(RUNS))
    log_n, log_d = np.log(RUNS).T

    def huber(theta):
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
        r = np.abs(np.logaddexp.reduce(terms) - log_loss) / 1e-3
        return np.where(r < 1, r**2 / 2, r - 0.5).mean()

    # a few starts of the paper's grid
    starts = grid([5, 10], [5, 10], [0, 0.5], [0.5, 1], [0.5, 1])
    best = min(minimize(huber, start, method="L-BFGS-B").fun for start in starts)
    fitted = Chinchilla().fit(RUNS, np.exp(log_loss))
    assert fitted.objective_ <= best * (1 + 1e-6)
    theta = [np.log(fitted.A_), np.log(fitted.B_), np.log(fitted.E_), fitted.alpha_, fitted.beta_]
    np.testing.assert_allclose(huber(theta), fitted.objective_, rtol=1e-9)


def test_compute_optimal_is_the_minimum_along_the_budget():
    law = Chinchilla.from_parameters(*HOFFMANN)
    params, tokens = law.compute_optimal(1e21)
    np.testing.assert_allclose(6 * params * tokens, 1e21)
    along = params * np.geomspace(0.5, 2, 101)
    losses = law.predict(np.column_stack([along, 1e21 / (6 * along)]))
    assert losses.argmin() == 50


@pytest.mark.parametrize("coupling", ["tied", "kaplan", "harmonic", "free"])
def test_softq_recovers_exact_losses(coupling):
    alpha = 0.45
    beta = alpha / (1 + alpha) if coupling == "tied" else 0.38
    q = {"tied": 3.0, "free": 3.0, "kaplan": 1 / beta, "harmonic": 1 / alpha}[coupling]
    loss = softq_loss(RUNS, 1.7, 9000, 8000, alpha, beta, q)
    law = SoftQ(coupling).fit(RUNS, loss)
    fitted = (law.E_, law.A_, law.B_, law.alpha_, law.beta_, law.q_)
    np.testing.assert_allclose(fitted, (1.7, 9000, 8000, alpha, beta, q), rtol=1e-3)


def test_softq_is_chinchilla_at_q_one_and_the_maximum_at_large_q():
    law = SoftQ("free").fit(RUNS, softq_loss(RUNS, 1.7, 480, 2000, 0.35, 0.36, 1.0))
    np.testing.assert_allclose(law.q_, 1.0, rtol=1e-3)
    chinchilla = Chinchilla.from_parameters(law.E_, law.A_, law.B_, law.alpha_, law.beta_)
    np.testing.assert_allclose(law.predict(RUNS), chinchilla.predict(RUNS), rtol=1e-4)

    sharp = SoftQ("free").fit(RUNS, softq_loss(RUNS, 1.7, 480, 2000, 0.35, 0.36, 40.0))
    expected = 1.7 + np.maximum(480 * RUNS[:, 0] ** -0.35, 2000 * RUNS[:, 1] ** -0.36)
    np.testing.assert_allclose(sharp.predict(RUNS), expected, rtol=5e-3)


def test_order_of_runs_and_unit_of_parameters_do_not_matter():
    rng = np.random.default_rng(1)
    loss = softq_loss(RUNS, 1.7, 9000, 8000, 0.45, 0.31, 3.0)
    loss = loss * np.exp(0.002 * rng.standard_normal(len(loss)))
    law = SoftQ(n_init=4).fit(RUNS, loss)
    order = rng.permutation(len(loss))
    np.testing.assert_allclose(SoftQ(n_init=4).fit(RUNS[order], loss[order]).q_, law.q_, rtol=1e-4)
    millions = SoftQ(n_init=4).fit(RUNS / [1e6, 1], loss)
    np.testing.assert_allclose(millions.predict(RUNS / [1e6, 1]), law.predict(RUNS), rtol=1e-6)
    np.testing.assert_allclose(millions.A_ * 1e6**law.alpha_, law.A_, rtol=1e-3)


@settings(max_examples=6, deadline=None)
@given(
    alpha=st.floats(0.2, 0.6),
    q=st.floats(0.7, 10),
    E=st.floats(0.5, 3),
    log_ratio=st.floats(-1.5, 1.5),
)
def test_fitted_laws_fall_with_parameters_and_tokens(alpha, q, E, log_ratio):
    beta = alpha / (1 + alpha)
    middle = np.exp(np.log(RUNS).mean(axis=0))
    A, B = middle[0] ** alpha, np.exp(log_ratio) * middle[1] ** beta
    law = SoftQ(n_init=6).fit(RUNS, softq_loss(RUNS, E, A, B, alpha, beta, q))
    wide = grid(np.geomspace(1e7, 1e11, 8), np.geomspace(1e8, 1e12, 8))
    predicted = law.predict(wide).reshape(8, 8)
    assert (np.diff(predicted, axis=0) <= 1e-12).all()
    assert (np.diff(predicted, axis=1) <= 1e-12).all()


@pytest.mark.parametrize("kappa", [0.5, 1.0, 1.3])
@pytest.mark.parametrize(
    "law", [SoftQ(n_init=4), Chinchilla(n_init=4)], ids=["softq", "chinchilla"]
)
def test_data_multiplier_returns_the_factor_that_made_the_loss(law, kappa):
    law = clone(law).fit(RUNS, softq_loss(RUNS, 1.7, 9000, 8000, 0.45, 0.45 / 1.45, 3.0))
    better = law.predict(RUNS * [1, kappa])
    np.testing.assert_allclose(law.data_multiplier(RUNS, better), kappa, rtol=1e-6)
    unreachable = np.full(len(RUNS), law.E_ * 0.9)
    assert np.isposinf(law.data_multiplier(RUNS, unreachable)).all()


def test_data_constrained_is_chinchilla_where_nothing_repeats():
    law = DataConstrained.from_parameters(*MUENNIGHOFF)
    chinchilla = Chinchilla.from_parameters(*MUENNIGHOFF[:5])
    X = np.array([[1e8, 1e10, 1.0], [4e8, 1e10, 1.0], [1e8, 1e10, 0.3]])
    seen = np.column_stack([X[:, 0], X[:, 1] * X[:, 2]])
    np.testing.assert_allclose(law.predict(X), chinchilla.predict(seen), rtol=1e-12)


def test_data_constrained_effective_counts():
    E, A, B, alpha, beta, r_n, r_d = MUENNIGHOFF
    law = DataConstrained.from_parameters(*MUENNIGHOFF)
    # N_opt(U) = 0.051 U for the published constants
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    np.testing.assert_allclose(G * G, 0.051, atol=5e-4)
    n, u, epochs = 5e9, 1e10, 9.0
    fed = G * G * u
    n_eff = fed + fed * r_n * (1 - np.exp(-(n / fed - 1) / r_n))
    d_eff = u + u * r_d * (1 - np.exp(-(epochs - 1) / r_d))
    expected = E + A * n_eff**-alpha + B * d_eff**-beta
    np.testing.assert_allclose(law.predict([[n, u, epochs]]), expected, rtol=1e-12)
    # forty thousand epochs are worth 1 + R_D* epochs, and no more
    limit = E + A * n_eff**-alpha + B * (u * (1 + r_d)) ** -beta
    np.testing.assert_allclose(law.predict([[n, u, 4e4]]), limit, rtol=1e-9)


@pytest.mark.parametrize("tie", [True, False])
def test_data_constrained_recovers_exact_losses(tie):
    constants = (1.87, 521, 1488 if tie else 3000, 0.353, 0.353 if tie else 0.38, 5.31, 15.39)
    X = grid([1e8, 1e9, 4e9], [1e9, 1e10], [0.5, 1, 4, 16, 64])
    loss = DataConstrained.from_parameters(*constants).predict(X)
    law = DataConstrained(tie_exponents=tie, n_init=4).fit(X, loss)
    fitted = (law.E_, law.A_, law.B_, law.alpha_, law.beta_, law.R_N_, law.R_D_)
    np.testing.assert_allclose(fitted, constants, rtol=1e-2)


def test_confidence_intervals_cover_the_truth_and_repeat():
    rng = np.random.default_rng(0)
    X = grid(np.geomspace(1e8, 6e9, 6), np.geomspace(2e9, 5e10, 5))
    loss = Chinchilla.from_parameters(*BESIROGLU).predict(X)
    loss = loss * np.exp(0.002 * rng.standard_normal(len(loss)))
    law = Chinchilla().fit(X, loss)
    intervals = law.confidence_intervals(X, loss, n_resamples=12, random_state=0)
    assert intervals == law.confidence_intervals(X, loss, n_resamples=12, random_state=0)
    for name, value in zip(("E", "alpha", "beta"), (1.8172, 0.3478, 0.3658), strict=True):
        low, high = intervals[name]
        assert low < high
        assert low - 0.5 * (high - low) <= value <= high + 0.5 * (high - low)
        assert low <= getattr(law, f"{name}_") <= high


def quanta_losses(X, n_quanta=100_000):
    """Losses of a model that holds the most used quanta, each learned if seen often enough."""
    k = np.arange(1, n_quanta + 1)
    p = k**-1.6
    p /= p.sum()
    kept = k[None] <= X[:, :1] / 4e4
    learned = kept * -np.expm1(-X[:, 1:] * p / 400)
    return 1.7 + 3.0 * (1 - (learned * p).sum(1))


def test_softq_predicts_held_out_runs_of_a_quanta_model():
    X = grid([72e6, 140e6, 257e6, 664e6, 1.4e9], [1e8, 2e8, 3e8, 4e8])
    loss = quanta_losses(X)
    seen = (X[:, 0] < 1e9) & (X[:, 1] < 3.5e8)
    error = {}
    for name, law in (("softq", SoftQ(n_init=4)), ("chinchilla", Chinchilla(n_init=4))):
        predicted = law.fit(X[seen], loss[seen]).predict(X[~seen])
        error[name] = np.sqrt(np.mean((predicted - loss[~seen]) ** 2))
    assert error["softq"] < 0.5 * error["chinchilla"]


def test_scikit_learn_habits():
    loss = softq_loss(RUNS, 1.7, 9000, 8000, 0.45, 0.31, 3.0)
    law = SoftQ(delta=2e-3, n_init=2)
    assert clone(law).get_params() == law.get_params()
    scores = cross_val_score(law, RUNS, loss, cv=3)
    assert scores.shape == (3,)
    with pytest.raises(Exception, match="not fitted"):
        SoftQ().predict(RUNS)
    fitted = law.fit(RUNS, loss)
    with pytest.raises(ValueError, match="features"):
        fitted.predict(np.hstack([RUNS, RUNS]))


@pytest.mark.parametrize("law", [Chinchilla(n_init=2), SoftQ(n_init=2)], ids=["add", "softq"])
def test_common_checks_fail_only_where_they_feed_no_runs(law):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(law, on_fail=None)
    failed = [r for r in results if r["status"] == "failed"]
    reasons = ("X must have", "X must be positive", "y must be positive", "distinct runs")
    unexpected = [
        (r["check_name"], str(r["exception"]))
        for r in failed
        if not any(reason in f"{r['exception']} {r['exception'].__cause__}" for reason in reasons)
    ]
    assert not unexpected
    assert sum(r["status"] == "passed" for r in results) >= 10


@pytest.mark.parametrize(
    ("law", "X", "y", "message"),
    [
        (Chinchilla(), RUNS[:4], np.ones(4), "at least 5 distinct runs"),
        (Chinchilla(), RUNS * [1, 0], np.ones(12), "X must be positive"),
        (Chinchilla(), RUNS, np.zeros(12), "y must be positive"),
        (Chinchilla(), RUNS[:, :1], np.ones(12), "X must have 2 or 3 columns"),
        (SoftQ(), np.hstack([RUNS, RUNS[:, :1]]), np.ones(12), "X must have 2 columns"),
        (SoftQ("loose"), RUNS, np.ones(12), "coupling must be one of"),
        (Chinchilla(delta=0), RUNS, np.ones(12), "delta"),
        (Chinchilla(n_init=0), RUNS, np.ones(12), "n_init"),
        (Chinchilla(), np.where(RUNS == RUNS[0, 0], np.nan, RUNS), np.ones(12), "NaN"),
    ],
)
def test_bad_input(law, X, y, message):
    with pytest.raises(ValueError, match=message):
        law.fit(X, y)


def test_bad_constants():
    with pytest.raises(ValueError, match="alpha"):
        Chinchilla.from_parameters(1.0, 1.0, 1.0, -0.1, 0.3)
    with pytest.raises(ValueError, match="flops"):
        Chinchilla.from_parameters(*HOFFMANN).compute_optimal(0.0)


def test_warns_when_nothing_converges(monkeypatch):
    def stuck(objective, start, **options):
        result = minimize(lambda t: (0.0, np.zeros_like(t)), start, jac=True)
        result.fun, result.success = np.nan, False
        return result

    monkeypatch.setattr("sciml.lm.scaling_laws.minimize", stuck)
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        Chinchilla().fit(RUNS, Chinchilla.from_parameters(*HOFFMANN).predict(RUNS))


def test_plot_draws_a_curve_for_each_size():
    import matplotlib as mpl

    mpl.use("agg")
    law = Chinchilla.from_parameters(*HOFFMANN)
    ax = law.plot(RUNS, law.predict(RUNS))
    assert len(ax.get_lines()) == 2 * 4
    assert ax.get_xlabel() == "unique tokens"
