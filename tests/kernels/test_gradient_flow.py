"""Gradient flow and descent against closed forms, general integrators and their limits."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from sciml.kernels import (
    NTK,
    KernelMachineClassifier,
    KernelMachineRegressor,
    kernel_gradient_descent,
    kernel_gradient_flow,
)

LOSSES = ("hinge", "squared_hinge", "logistic", "squared", "epsilon_insensitive")
EPSILON = 0.1


def problem(loss, n=30, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, 4))
    y = np.sin(2 * X[:, 0]) + 0.3 * rng.standard_normal(n)
    if loss not in ("squared", "epsilon_insensitive"):
        y = np.where(y > 0, 1.0, -1.0)
    return NTK()(X) * 4, y


def objective(alpha, K, y, loss, lam):
    f = alpha @ K
    value = {
        "hinge": np.maximum(0, 1 - y * f),
        "squared_hinge": np.maximum(0, 1 - y * f) ** 2,
        "logistic": np.logaddexp(0, -y * f),
        "squared": (y - f) ** 2,
        "epsilon_insensitive": np.maximum(0, np.abs(y - f) - EPSILON),
    }[loss].sum(axis=-1)
    return lam / 2 * (alpha * f).sum(axis=-1) + value


def optimum(K, y, loss, lam):
    if loss in ("squared", "epsilon_insensitive"):
        machine = KernelMachineRegressor("precomputed", loss=loss, C=1 / lam, tol=1e-10)
    else:
        machine = KernelMachineClassifier("precomputed", loss=loss, C=1 / lam, tol=1e-10)
    return machine.fit(K, y).dual_coef_


def norm(alpha, K):
    return np.sqrt(np.maximum(0, np.einsum("...i,ij,...j->...", alpha, K, alpha)))


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_squared_equals_the_matrix_exponential(lam):
    K, y = problem("squared")
    M = 2 * K + lam * np.eye(30)
    initial = np.random.default_rng(1).standard_normal(30)
    for t in (0.0, 0.2, 3.0):
        decay = expm(-M * t)
        expected = np.linalg.solve(M, (np.eye(30) - decay) @ (2 * y))
        np.testing.assert_allclose(
            kernel_gradient_flow(K, y, "squared", lam, t), expected, atol=1e-8
        )
        if lam > 0:  # the same in outputs
            outputs = 2 * K @ np.linalg.solve(M, (np.eye(30) - decay) @ y)
            np.testing.assert_allclose(K @ expected, outputs, atol=1e-10)
        moved = kernel_gradient_flow(K, y, "squared", lam, t, initial=initial)
        np.testing.assert_allclose(moved, expected + decay @ initial, atol=1e-8)


def test_hinge_before_any_margin_is_met():
    K, y = problem("hinge")
    start = 0.01 * np.random.default_rng(2).standard_normal(30)
    for lam in (0.0, 0.7):
        t = 1e-3
        share = t if lam == 0 else (1 - math.exp(-lam * t)) / lam
        expected = math.exp(-lam * t) * start + share * y
        result = kernel_gradient_flow(K, y, "hinge", lam, t, initial=start)
        np.testing.assert_allclose(result, expected, rtol=1e-12)


def test_one_sample_meets_its_margin_and_stays():
    # f' = k - lam f until f = 1 at t = log(k / (k - lam)) / lam; from then on alpha = 1 / k.
    k, lam = 2.0, 0.5
    meets = math.log(k / (k - lam)) / lam
    t = np.array([0.5 * meets, meets, meets + 1, 50.0])
    alpha = kernel_gradient_flow([[k]], [1.0], "hinge", lam, t)[:, 0]
    expected = np.minimum((1 - np.exp(-lam * t)) / lam, 1 / k)
    np.testing.assert_allclose(alpha, expected, rtol=1e-12)
    # Strong regularisation: the margin is out of reach and the sample ends at its bound.
    end = kernel_gradient_flow([[k]], [-1.0], "hinge", 4.0, 50.0)
    np.testing.assert_allclose(end, [-1 / 4.0], rtol=1e-12)


def test_two_samples_slide_with_the_forces_that_keep_both_margins():
    K, y, lam = np.array([[1.0, 0.4], [0.4, 2.0]]), np.array([1.0, 1.0]), 0.1
    end = kernel_gradient_flow(K, y, "hinge", lam, 200.0)
    np.testing.assert_allclose(K @ end, 1, atol=1e-10)
    np.testing.assert_allclose(end, np.linalg.solve(K, y), rtol=1e-7)


def test_epsilon_tube_of_one_sample():
    # From above the tube, f falls to its upper end 1.1; regularisation then carries it through
    # the tube freely to its lower end 0.9, where it stays.
    k, lam = 1.0, 0.5
    t_upper = math.log((2.0 + k / lam) / (1.1 + k / lam)) / lam
    t_lower = t_upper + math.log(1.1 / 0.9) / lam
    t = np.array([t_upper, (t_upper + t_lower) / 2, t_lower, t_lower + 3])
    f = kernel_gradient_flow([[k]], [1.0], "epsilon_insensitive", lam, t, initial=[2.0])[:, 0]
    np.testing.assert_allclose(f, [1.1, math.sqrt(1.1 * 0.9), 0.9, 0.9], rtol=1e-10)


# ---------------------------------------------------------------- general integrators


@pytest.mark.parametrize("loss", ["squared_hinge", "logistic", "squared"])
def test_smooth_losses_equal_an_explicit_integrator(loss):
    K, y = problem(loss)
    lam, t = 0.5, np.array([0.05, 0.5, 2.0])

    def velocity(_, alpha):
        f = K @ alpha
        force = {
            "squared_hinge": 2 * y * np.maximum(0, 1 - y * f),
            "logistic": y / (1 + np.exp(y * f)),
            "squared": 2 * (y - f),
        }[loss]
        return force - lam * alpha

    path = solve_ivp(
        velocity, (0, 2.0), np.zeros(30), "DOP853", t_eval=t, rtol=1e-11, atol=1e-13
    ).y.T
    np.testing.assert_allclose(kernel_gradient_flow(K, y, loss, lam, t), path, atol=2e-8)


@pytest.mark.parametrize("loss", ["hinge", "epsilon_insensitive"])
def test_kinked_losses_equal_the_proximal_point_method(loss):
    """Implicit Euler steps, each a machine of its own, converge to the flow.

    A step of size h from a minimises lam/2 ||f||^2 + L(f) + ||f - a||^2 / (2 h), which is the
    machine's problem with targets shifted by the outputs of a.
    """
    K, y = problem(loss, n=12)
    lam, t = 0.5, 1.5
    exact = kernel_gradient_flow(K, y, loss, lam, t)
    gaps = []
    for steps in (30, 240):
        h = t / steps
        alpha, c = np.zeros(12), np.zeros(12)
        for _ in range(steps):
            # b = alpha / (1 + h lam) + h / (1 + h lam) c, with c = -l'(K b): by a small
            # quadratic program in c, solved by projected coordinate descent.
            base, rate = alpha / (1 + h * lam), h / (1 + h * lam)
            for _ in range(40):
                for i in range(12):
                    f = K[i] @ (base + rate * c)
                    curvature = rate * K[i, i]
                    if loss == "hinge":
                        best = c[i] + (y[i] - f) / curvature
                        c[i] = min(max(best, min(0, y[i])), max(0, y[i]))
                    else:
                        best = c[i] + (y[i] - f) / curvature
                        best = math.copysign(max(0, abs(best) - EPSILON / curvature), best)
                        c[i] = min(max(best, -1), 1)
            alpha = base + rate * c
        gaps.append(np.abs(K @ (alpha - exact)).max())
    assert gaps[0] < 0.05
    assert gaps[1] < 0.3 * gaps[0]  # first order: about 1/8


@pytest.mark.parametrize("loss", LOSSES)
def test_descent_tends_to_the_flow(loss):
    K, y = problem(loss)
    lam, t = 0.5, 1.0
    exact = K @ kernel_gradient_flow(K, y, loss, lam, t)
    gaps = []
    for steps in (400, 3200):
        alpha = kernel_gradient_descent(K, y, loss, lam, t / steps, steps)
        gaps.append(np.abs(K @ alpha - exact).max())
    assert gaps[0] < 0.05
    assert gaps[1] < 0.25 * gaps[0]  # about 1/8


@pytest.mark.parametrize("loss", LOSSES)
def test_descent_is_the_written_recursion(loss):
    K, y = problem(loss, n=8)
    lam, step = 0.3, 0.05
    alpha, path = np.zeros(8), []
    for _ in range(20):
        old, alpha = alpha, np.empty(8)
        for i in range(8):
            f = sum(K[i, j] * old[j] for j in range(8))
            slope = {
                "hinge": -y[i] if y[i] * f < 1 else 0.0,
                "squared_hinge": -2 * y[i] * max(0.0, 1 - y[i] * f),
                "logistic": -y[i] / (1 + math.exp(y[i] * f)),
                "squared": 2 * (f - y[i]),
                "epsilon_insensitive": np.sign(f - y[i]) if abs(f - y[i]) > EPSILON else 0.0,
            }[loss]
            alpha[i] = (1 - step * lam) * old[i] - step * slope
        path.append(alpha)
    result = kernel_gradient_descent(K, y, loss, lam, step, [20, 0, 7])
    np.testing.assert_allclose(result, [path[19], np.zeros(8), path[6]], atol=1e-12)
    np.testing.assert_array_equal(
        kernel_gradient_descent(K, y, loss, lam, step, 7, initial=np.zeros(8)), result[2]
    )


# ---------------------------------------------------------------- limits and laws


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("lam", [0.064, 1.0])
def test_flow_tends_to_the_machine_as_fast_as_proved(loss, lam):
    K, y = problem(loss, n=60)
    t = np.linspace(0, 20, 30) / lam
    path, best = kernel_gradient_flow(K, y, loss, lam, t), optimum(K, y, loss, lam)
    distance = norm(path - best, K)
    assert (distance <= np.exp(-lam * t) * distance[0] * (1 + 1e-6) + 1e-7).all()
    gap = objective(path, K, y, loss, lam) - objective(best, K, y, loss, lam)
    assert (gap <= np.exp(-2 * lam * t) * gap[0] * (1 + 1e-6) + 1e-8).all()
    assert (np.diff(gap) <= 1e-9).all()
    np.testing.assert_allclose(K @ path[-1], K @ best, atol=1e-6)


@pytest.mark.parametrize("loss", ["squared_hinge", "logistic", "squared"])
def test_descent_tends_to_the_machine(loss):
    K, y = problem(loss)
    lam = 1.0
    step = 1 / (lam + 2 * np.linalg.norm(K, 2))
    alpha = kernel_gradient_descent(K, y, loss, lam, step, 4000)
    np.testing.assert_allclose(K @ alpha, K @ optimum(K, y, loss, lam), atol=1e-6)


@pytest.mark.parametrize("loss", ["hinge", "epsilon_insensitive"])
def test_subgradient_descent_ends_within_its_step_of_the_machine(loss):
    K, y = problem(loss)
    lam, best = 1.0, optimum(K, y, loss, 1.0)
    for step in (1e-2, 1e-3):
        alpha = kernel_gradient_descent(K, y, loss, lam, step, int(15 / step))
        assert np.abs(K @ (alpha - best)).max() < step * np.abs(K).sum(axis=1).max()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    loss=st.sampled_from(LOSSES),
    lam=st.sampled_from([0.0, 0.05, 1.0]),
    first=st.floats(0.0, 3.0),
    second=st.floats(0.0, 3.0),
)
def test_flow_may_be_interrupted(seed, loss, lam, first, second):
    K, y = problem(loss, n=10, seed=seed)
    half = kernel_gradient_flow(K, y, loss, lam, first)
    whole = kernel_gradient_flow(K, y, loss, lam, first + second)
    resumed = kernel_gradient_flow(K, y, loss, lam, second, initial=half)
    np.testing.assert_allclose(K @ resumed, K @ whole, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), loss=st.sampled_from(LOSSES), epsilon=st.floats(0, 0.5))
def test_two_flows_never_separate(seed, loss, epsilon):
    # Gradient flows of convex functions contract, here at the rate of the regulariser.
    K, y = problem(loss, n=10, seed=seed)
    rng, lam = np.random.default_rng(seed), 0.4
    a, b = 3 * rng.standard_normal((2, 10))
    t = np.array([0.0, 0.1, 1.0, 4.0])
    options = {"epsilon": epsilon}
    path_a = kernel_gradient_flow(K, y, loss, lam, t, initial=a, **options)
    path_b = kernel_gradient_flow(K, y, loss, lam, t, initial=b, **options)
    distance = norm(path_a - path_b, K)
    assert (distance <= np.exp(-lam * t) * distance[0] * (1 + 1e-6) + 1e-7).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_repeated_samples_and_zero_rows(loss):
    K, y = problem(loss, n=8)
    double = np.zeros((17, 17))
    double[:16, :16] = np.tile(K, (2, 2))
    target = np.r_[y, y, 1.0]
    path = kernel_gradient_flow(double, target, loss, 0.2, [1.0, 5.0])
    f = path @ double
    np.testing.assert_allclose(f[:, :8], f[:, 8:16], atol=1e-9)
    np.testing.assert_array_equal(f[:, 16], 0)
    # Two copies are a loss, and so a time, of twice the size.
    single = kernel_gradient_flow(2 * K, y, loss, 0.2, [1.0, 5.0])
    np.testing.assert_allclose(f[:, :8], single @ (2 * K), atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_very_early_times(loss):
    K, y = problem(loss, n=10)
    slope = kernel_gradient_flow(K, y, loss, 0.3, 1e-12) / 1e-12
    times = [0.0, 5e-324, 1e-200, 1e-15]
    for lengthened in (times, [*times, 1.0]):
        path = kernel_gradient_flow(K, y, loss, 0.3, lengthened)
        np.testing.assert_allclose(path[:4], np.outer(times, slope), rtol=1e-9, atol=1e-320)


def test_times_keep_their_order_and_shape():
    K, y = problem("hinge")
    t = [2.0, 0.0, 1.0, 1.0]
    path = kernel_gradient_flow(K, y, "hinge", 0.5, t)
    for row, time in zip(path, t, strict=True):
        np.testing.assert_allclose(row, kernel_gradient_flow(K, y, "hinge", 0.5, time), atol=1e-12)
    assert kernel_gradient_flow(K, y, "logistic", 0.5, []).shape == (0, 30)
    assert kernel_gradient_descent(K, y, "logistic", 0.5, 0.1, []).shape == (0, 30)
    np.testing.assert_array_equal(path[1], 0)


def test_progress_bar(capsys):
    K, y = problem("hinge", n=4)
    kernel_gradient_descent(K, y, "hinge", 0.5, 0.1, 5, verbose=True)
    assert "5/5" in capsys.readouterr().err


# ---------------------------------------------------------------- bad input

GOOD = {"K": np.eye(3), "y": np.array([1.0, -1.0, 1.0]), "loss": "hinge", "lam": 0.5}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"K": np.ones((3, 2))}, ValueError, "K must be a square"),
        ({"K": np.tri(3)}, ValueError, "K must be symmetric"),
        ({"K": np.full((3, 3), np.nan)}, ValueError, "K must be finite"),
        ({"y": np.array([1.0, 0.0, 1.0])}, ValueError, "y must hold the classes -1 and 1"),
        ({"y": np.ones(2)}, ValueError, "y must have shape"),
        ({"y": np.array([1.0, np.inf, 1.0])}, ValueError, "y must be finite"),
        ({"loss": "absolute"}, ValueError, "loss must be one of"),
        ({"lam": -1.0}, ValueError, "lam must be in"),
        ({"lam": "1"}, TypeError, "lam must be a real number"),
        ({"initial": np.ones(2)}, ValueError, "initial must have shape"),
        ({"initial": np.full(3, np.nan)}, ValueError, "initial must be finite"),
        ({"epsilon": -0.1}, ValueError, "epsilon must be in"),
    ],
)
def test_bad_input(change, error, match):
    with pytest.raises(error, match=match):
        kernel_gradient_flow(**(GOOD | {"t": 1.0} | change))
    with pytest.raises(error, match=match):
        kernel_gradient_descent(**(GOOD | {"step": 0.1, "n_steps": 3} | change))


@pytest.mark.parametrize(
    ("t", "match"), [(-1.0, "t must be >= 0"), (np.nan, "t must be finite"), ([[1.0]], "shape")]
)
def test_bad_times(t, match):
    with pytest.raises(ValueError, match=match):
        kernel_gradient_flow(**GOOD, t=t)


@pytest.mark.parametrize(
    ("step", "n_steps", "error", "match"),
    [
        (0.0, 3, ValueError, "step must be in"),
        (0.1, -1, ValueError, "n_steps must be"),
        (0.1, 1.5, TypeError, "n_steps must be an integer"),
        (0.1, [[1]], ValueError, "n_steps must be an integer or have shape"),
    ],
)
def test_bad_steps(step, n_steps, error, match):
    with pytest.raises(error, match=match):
        kernel_gradient_descent(**GOOD, step=step, n_steps=n_steps)


def test_diverging_descent_is_an_error():
    with pytest.raises(ValueError, match="step must be small enough.*9.0"):
        kernel_gradient_descent(np.eye(3), np.ones(3), "squared", 1.0, 9.0, 2000)
