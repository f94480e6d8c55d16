"""Robustness certificates: closed form, soundness under attack, reference numbers."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.gaussian_process.kernels import RBF
from sklearn.svm import SVC

from sciml.kernels import (
    NNGP,
    NTK,
    KernelMachineClassifier,
    KernelMachineRegressor,
    certificates,
    certified_radius,
    ntk,
)


def digits(n_class=2, n_train=260, n_test=100):
    data = load_digits(n_class=n_class)
    order = np.random.RandomState(0).permutation(len(data.target))[: n_train + n_test]
    X, y = data.data[order] / 16, data.target[order]
    return X[:n_train], y[:n_train], X[n_train:], y[n_train:]


def fitted(kernel, n_class=2, n_train=120, n_test=20, loss="hinge", C=15.625):
    X, y, X_test, y_test = digits(n_class, n_train, n_test)
    return KernelMachineClassifier(kernel, loss=loss, C=C).fit(X, y), X_test, y_test


# ---------------------------------------------------------------- closed form


def h(u):
    return 2 * u * (math.pi - math.acos(u)) + math.sqrt(1 - u * u)


def test_minimum_of_h():
    u = np.linspace(-1, 1, 2_000_001)
    values = 2 * u * (np.pi - np.arccos(u)) + np.sqrt(1 - u * u)
    assert abs(u[values.argmin()] - certificates.U_STAR) < 1e-6
    assert abs(certificates.U_STAR - -0.794099864810) < 1e-12
    assert abs(certificates.H_STAR - -0.429737820518) < 1e-12
    assert certificates.H_STAR <= values.min()


def clip(u):
    return min(max(u, -1.0), 1.0)


def margin_of_one(alpha, X, x0, sign, delta, norm_bound):
    """Bound sign * f on the box around x0, one point after the other (one hidden layer)."""
    d, total = len(x0), 0.0
    for a, x in zip(alpha, X, strict=True):
        length = np.linalg.norm(x)
        if norm_bound == "l2":
            reach = math.sqrt(d) * delta * length
            low = max(np.linalg.norm(x0) - math.sqrt(d) * delta, 0)
            high = np.linalg.norm(x0) + math.sqrt(d) * delta
        else:
            reach = delta * np.abs(x).sum()
            low = np.linalg.norm(np.maximum(np.abs(x0) - delta, 0))
            high = np.linalg.norm(np.abs(x0) + delta)
        dot_low, dot_high = x0 @ x - reach, x0 @ x + reach
        if low == 0:
            u_low, u_high = -1.0, 1.0
            u_low = clip(dot_low / (high * length)) if dot_low >= 0 else -1.0
            u_high = clip(dot_high / (high * length)) if dot_high < 0 else 1.0
        else:
            u_low = clip(dot_low / ((high if dot_low >= 0 else low) * length))
            u_high = clip(dot_high / ((low if dot_high >= 0 else high) * length))
        h_low, h_high = min(h(u_low), h(u_high)), max(h(u_low), h(u_high))
        if u_low <= -0.7940998648103 <= u_high:
            h_low = -0.4297378205183
        scale = length / (2 * math.pi * d)
        K_low = scale * (low if h_low >= 0 else high) * h_low
        K_high = scale * (high if h_high >= 0 else low) * h_high
        total += sign * a * (K_low if sign * a > 0 else K_high)
    return total


@pytest.mark.parametrize("norm_bound", ["l2", "linf"])
def test_lockstep_bisection_equals_one_sample_at_a_time(norm_bound):
    machine, X_test, y_test = fitted(NTK(), n_train=60, n_test=12)
    radii = certified_radius(machine, X_test, y_test, norm_bound=norm_bound)
    for x0, radius in zip(X_test, radii, strict=True):
        sign = np.sign(machine.decision_function(x0[None])[0])
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            arguments = (machine.dual_coef_, machine.X_fit_, x0, sign, middle, norm_bound)
            low, high = (middle, high) if margin_of_one(*arguments) > 0 else (low, middle)
        assert low > 0
        np.testing.assert_allclose(radius, low, rtol=2e-6)


@pytest.mark.parametrize("kernel", [NTK(2), NTK(3, 1.3, 0.2), NTK(1, 1.0, 0.3), NNGP(2)])
def test_interval_of_a_point_is_the_kernel(kernel):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((30, 5)), rng.standard_normal((30, 5))
    w2, b2 = kernel.w_std**2, kernel.b_std**2
    exact = np.diagonal(kernel(X, y))
    for x, z, K in zip(X, y, exact, strict=True):
        s, qx, qz = (w2 / 5 * a @ b + b2 for a, b in ((x, z), (x, x), (z, z)))
        c = math.sqrt(qx * qz)
        interval = certificates._kernel_interval(
            s, s, c, c, qx, qx, qz, w2, b2, kernel.depth, isinstance(kernel, NTK)
        )
        np.testing.assert_allclose(interval, K, rtol=1e-9)


# ---------------------------------------------------------------- soundness


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(1, 4),
    b_std=st.sampled_from([0.0, 0.1, 1.0]),
    tangent=st.booleans(),
    delta=st.floats(1e-4, 3.0),
)
def test_interval_holds_the_kernel_on_the_box(seed, depth, b_std, tangent, delta):
    rng = np.random.default_rng(seed)
    d, w2, b2 = 3, 1.5**2, b_std**2
    x, z = rng.standard_normal(d), rng.standard_normal(d)
    corners = np.array(np.meshgrid(*[[-delta, 0, delta]] * d)).reshape(d, -1).T
    box = x + np.vstack([corners, rng.uniform(-delta, delta, (300, d))])
    K = (NTK if tangent else NNGP)(depth, 1.5, b_std)(box, z[None])[:, 0]
    low = np.linalg.norm(np.maximum(np.abs(x) - delta, 0))
    high = np.linalg.norm(np.abs(x) + delta)
    q_low, q_high, q_z = (w2 / d * q + b2 for q in (low**2, high**2, z @ z))
    move = delta * np.abs(z).sum()
    interval = certificates._kernel_interval(
        w2 / d * (x @ z - move) + b2, w2 / d * (x @ z + move) + b2,
        math.sqrt(q_low * q_z), math.sqrt(q_high * q_z),
        q_low, q_high, q_z, w2, b2, depth, tangent,
    )  # fmt: skip
    slack = 1e-9 * (1 + abs(K).max())
    assert interval[0] <= K.min() + slack
    assert interval[1] >= K.max() - slack


def margins(K, machine, decision):
    """Smallest f_c - f_j over the rivals j of the decisions c, from kernel rows (torch)."""
    f = K @ torch.from_numpy(machine.dual_coef_)
    if f.ndim == 1:
        return f * (2 * decision - 1)
    rivals = f.scatter(1, decision[:, None], -math.inf).amax(1)
    return f.gather(1, decision[:, None])[:, 0] - rivals


def smallest_margins(machine, X, radii):
    """Attack samples by corners, random points and projected gradient descent of the margin."""
    kernel, points = machine.kernel_, machine.X_fit_
    rng = np.random.default_rng(0)
    decisions = torch.from_numpy(np.searchsorted(machine.classes_, machine.predict(X)))
    smallest = []
    for x, radius, decision in zip(X, radii, decisions, strict=True):
        moves = rng.uniform(-1, 1, (500, len(x)))
        attacks = x + radius * np.vstack([moves, np.sign(moves)])
        K = torch.from_numpy(kernel(attacks, points))
        smallest.append(margins(K, machine, decision.expand(len(K))).min())
    smallest = torch.stack(smallest)

    centre, reach = torch.from_numpy(X), torch.from_numpy(radii)[:, None]
    for start in range(2):
        noise = rng.uniform(-1, 1, X.shape) if start else np.zeros_like(X)
        Z = centre + reach * torch.from_numpy(noise)
        for _ in range(12):
            Z = Z.detach().requires_grad_(True)
            K = ntk(
                Z, torch.from_numpy(points), depth=kernel.depth, w_std=kernel.w_std,
                b_std=kernel.b_std, kind="ntk" if isinstance(kernel, NTK) else "nngp",
            )  # fmt: skip
            values = margins(K, machine, decisions)
            smallest = torch.minimum(smallest, values.detach())
            (slope,) = torch.autograd.grad(values.sum(), Z)
            Z = torch.clamp(Z.detach() - 0.3 * reach * slope.sign(), centre - reach, centre + reach)
    return smallest.numpy()


@pytest.mark.parametrize(
    ("kernel", "n_class"),
    [
        (NTK(), 2),
        (NTK(2), 2),
        (NTK(3), 2),
        (NTK(1, 1.0, 0.3), 2),
        (NTK(2, 1.4, 0.3), 2),
        (NNGP(), 2),
        (NTK(), 4),
        (NTK(2), 4),
    ],
    ids=repr,
)
def test_no_attack_within_the_radius_succeeds(kernel, n_class):
    machine, X_test, _ = fitted(kernel, n_class, n_train=80, n_test=5)
    l2, linf = (certified_radius(machine, X_test, norm_bound=b) for b in ("l2", "linf"))
    assert (np.minimum(l2, linf) > 1e-4).all()
    assert (smallest_margins(machine, X_test, np.maximum(l2, linf)) > 0).all()


def test_the_attack_succeeds_well_beyond_the_radius():
    # Without this the test above could pass with an attack that never works.
    machine, X_test, _ = fitted(NTK(), n_train=80, n_test=5)
    assert (smallest_margins(machine, X_test, 20 * certified_radius(machine, X_test)) < 0).all()


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge", "logistic", "squared"])
@pytest.mark.parametrize("kernel", [NTK(), NTK(2), NTK(1, 1.0, 0.2), NNGP(2)], ids=repr)
def test_linf_certifies_at_least_as_much_as_l2(kernel, loss):
    machine, X_test, _ = fitted(kernel, loss=loss)
    l2, linf = (certified_radius(machine, X_test, norm_bound=b) for b in ("l2", "linf"))
    assert (linf >= l2 * (1 - 1e-6)).all()
    assert linf.mean() > 1.2 * l2.mean() > 0


def test_depth_two_is_not_certified_by_the_two_layer_formula():
    machine, X_test, _ = fitted(NTK(2), n_train=60, n_test=5)
    radii = certified_radius(machine, X_test)
    for x0, radius in zip(X_test, radii, strict=True):
        sign = np.sign(machine.decision_function(x0[None])[0])
        arguments = (machine.dual_coef_, machine.X_fit_, x0, sign, radius, "linf")
        assert abs(margin_of_one(*arguments)) > 1e-3


# ---------------------------------------------------------------- reference numbers


@pytest.mark.parametrize(
    ("loss", "lam", "norm_bound", "expected"),
    [
        ("hinge", 0.064, "l2", 0.01061),
        ("hinge", 0.064, "linf", 0.0170),
        ("squared", 1e-9, "l2", 5.5e-4),  # kernel regression
        ("squared", 0.001, "l2", 5.7e-4),
        ("squared", 0.01, "l2", 7.9e-4),
        ("squared", 0.1, "l2", 2.2e-3),
        ("squared", 1, "l2", 0.0107),
        ("squared", 10, "l2", 0.0218),
        ("squared", 1000, "l2", 0.0235),
    ],
)
def test_mean_certificates_on_digits(loss, lam, norm_bound, expected):
    X, y, X_test, y_test = digits()
    machine = KernelMachineClassifier(NTK(), loss=loss, C=1 / lam).fit(X, y)
    radii = certified_radius(machine, X_test, y_test, norm_bound=norm_bound)
    assert machine.score(X_test, y_test) == 1
    assert (radii > 0).all()
    np.testing.assert_allclose(radii.mean(), expected, rtol=0.02)


# ---------------------------------------------------------------- semantics


def test_misclassified_samples_and_ties_have_radius_zero():
    machine, X_test, y_test = fitted(NTK())
    radii = certified_radius(machine, X_test)
    wrong = y_test.copy()
    wrong[:7] = 1 - wrong[:7]
    np.testing.assert_array_equal(certified_radius(machine, X_test, wrong)[:7], 0)
    np.testing.assert_array_equal(certified_radius(machine, X_test, wrong)[7:], radii[7:])
    pair = KernelMachineClassifier(NTK(), C=1.0).fit(np.eye(2), [0, 1])
    tie = certified_radius(pair, np.array([[1.0, 1.0], [1.0, 0.0]]))
    assert tie[0] == 0
    assert tie[1] > 0


def test_a_machine_without_support_vectors_certifies_nothing():
    machine, X_test, _ = fitted(NTK())
    machine.dual_coef_ = np.zeros_like(machine.dual_coef_)
    np.testing.assert_array_equal(certified_radius(machine, X_test), 0)


def test_labels_may_be_strings_and_samples_a_data_frame():
    X, y, X_test, y_test = digits(n_train=60, n_test=10)
    names = np.array(["zero", "one"])
    frame = pd.DataFrame(X_test, columns=[f"pixel {i}" for i in range(64)])
    machine = KernelMachineClassifier(NTK()).fit(pd.DataFrame(X, columns=frame.columns), names[y])
    radii = certified_radius(machine, frame, pd.Series(names[y_test]))
    plain = certified_radius(KernelMachineClassifier(NTK()).fit(X, y), X_test, y_test)
    np.testing.assert_allclose(radii, plain, rtol=3e-6)


def test_radius_scales_with_the_data():
    # For b_std=0 the kernel is homogeneous of degree 2, which C has to undo.
    X, y, X_test, _ = digits(n_train=60, n_test=10)
    small = KernelMachineClassifier(NTK(2), C=10.0, tol=1e-10).fit(X, y)
    large = KernelMachineClassifier(NTK(2), C=10.0 / 1e6, tol=1e-10).fit(1000 * X, y)
    np.testing.assert_allclose(
        certified_radius(large, 1000 * X_test), 1000 * certified_radius(small, X_test), rtol=1e-4
    )


def test_max_radius_and_tol():
    machine, X_test, _ = fitted(NTK())
    exact = certified_radius(machine, X_test, tol=1e-12)
    coarse = certified_radius(machine, X_test, tol=0.1)
    assert ((coarse <= exact) & (coarse >= 0.9 * exact)).all()
    capped = certified_radius(machine, X_test, max_radius=0.012)
    np.testing.assert_allclose(capped, np.minimum(exact, 0.012), rtol=1e-6)
    assert 0 < (capped == 0.012).sum() < len(capped)


def test_chunks_do_not_change_the_result(monkeypatch):
    machine, X_test, _ = fitted(NTK(2))
    whole = certified_radius(machine, X_test)
    monkeypatch.setattr(certificates, "_CHUNK_ENTRIES", 3 * 120)
    np.testing.assert_allclose(certified_radius(machine, X_test), whole, rtol=2e-6)


def test_float32_samples_give_float64_radii():
    machine, X_test, _ = fitted(NTK())
    radii = certified_radius(machine, X_test.astype(np.float32))
    assert radii.dtype == np.float64
    np.testing.assert_allclose(radii, certified_radius(machine, X_test), rtol=1e-5)


# ---------------------------------------------------------------- bad input

MACHINE, GOOD, _ = fitted(NTK(), n_train=30, n_test=4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"machine": SVC()}, TypeError, "machine must be a KernelMachineClassifier"),
        ({"machine": KernelMachineRegressor(NTK())}, TypeError, "machine must be a Kernel"),
        ({"machine": KernelMachineClassifier(NTK())}, NotFittedError, "not fitted"),
        ({"norm_bound": "l1"}, ValueError, "norm_bound"),
        ({"max_radius": 0.0}, ValueError, "max_radius"),
        ({"tol": 0.0}, ValueError, "tol"),
        ({"X": GOOD[:, :3]}, ValueError, "features"),
        ({"X": GOOD[0]}, ValueError, "2D array"),
        ({"X": GOOD * np.nan}, ValueError, "NaN"),
        ({"X": GOOD * [[1], [0], [1], [0]]}, ValueError, "2 zero rows, the first at index 1"),
        ({"y": [0, 1]}, ValueError, "same length"),
        ({"y": np.zeros((4, 1))}, ValueError, "y must have shape"),
    ],
)
def test_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        certified_radius(**{"machine": MACHINE, "X": GOOD, **arguments})


@pytest.mark.parametrize("kernel", [RBF(), NTK() + NTK(2), "rbf"], ids=repr)
def test_rejects_other_kernels(kernel):
    machine, X_test, _ = fitted(kernel, n_train=30, n_test=4)
    with pytest.raises(TypeError, match="must have the kernel NTK or NNGP"):
        certified_radius(machine, X_test)


def test_zero_rows_are_fine_with_biases():
    machine, _, _ = fitted(NTK(1, 1.0, 0.5), n_train=30, n_test=4)
    assert certified_radius(machine, np.zeros((1, 64)))[0] > 0
