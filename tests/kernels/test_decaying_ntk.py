"""Machines of infinite width: the kernel decays, and networks converge to its machine."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from sciml.kernels import (
    NTKNetwork,
    decaying_ntk,
    decaying_ntk_descent,
    ntk,
    train_ntk_network,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def digits(n_train=260, n_test=100):
    """Digits 0 against 1 in float64: training inputs, labels, test inputs."""
    data = load_digits(n_class=2)
    order = np.random.RandomState(0).permutation(len(data.target))[: n_train + n_test]
    X, y = torch.from_numpy(data.data[order] / 16), torch.from_numpy(2.0 * data.target[order] - 1)
    return X[:n_train], y[:n_train], X[n_train:]


@pytest.mark.parametrize("depth", [1, 2])
def test_decaying_ntk_runs_from_ntk_to_nngp(depth):
    X, _, Z = digits(20, 10)
    kernel = {"depth": depth, "w_std": 1.2, "b_std": 0.3}
    full, last = (ntk(Z, X, kind=kind, **kernel) for kind in ("ntk", "nngp"))
    torch.testing.assert_close(decaying_ntk(Z, X, lam=3.0, t=0.0, **kernel), full)
    torch.testing.assert_close(decaying_ntk(Z, X, lam=0.0, t=9.0, **kernel), full)
    torch.testing.assert_close(decaying_ntk(Z, X, lam=3.0, t=99.0, **kernel), last)
    half = decaying_ntk(Z, X, lam=0.5, t=math.log(2), **kernel)
    torch.testing.assert_close(half, (full + last) / 2)


@pytest.mark.parametrize("lam", [0.0, 2.0])
@pytest.mark.parametrize("loss", ["hinge", "squared_hinge", "logistic", "squared"])
def test_decaying_descent_equals_the_recursion_of_the_outputs(loss, lam):
    X, y, Z = (a.numpy() for a in digits(30, 10))
    points = np.vstack([X, Z])
    full, last = ntk(points, X), ntk(points, X, kind="nngp")
    slope = {
        "hinge": lambda f: -y * (y * f < 1),
        "squared_hinge": lambda f: -2 * y * np.maximum(0, 1 - y * f),
        "logistic": lambda f: -y / (1 + np.exp(y * f)),
        "squared": lambda f: 2 * (f - y),
    }[loss]
    g, step = np.zeros(40), 0.01
    for k in range(50):
        Theta = last + (1 - step * lam) ** (2 * k) * (full - last)
        g = (1 - step * lam) * g - step * Theta @ slope(g[:30])
    machine = decaying_ntk_descent(
        full[:30], last[:30], y, loss=loss, lam=lam, step=step, n_steps=50
    )
    f = last @ machine.last + (full - last) @ machine.hidden
    np.testing.assert_allclose(f, g, rtol=1e-10, atol=1e-12)
    assert np.array_equal(machine.last, machine.hidden) == (lam == 0)


def sup_gaps(lam, t, n_steps, widths, seeds):
    """Mean sup-gaps of networks to the machines of the fixed and of the decaying kernel."""
    X, y, Z = digits()
    K, S, K_test, S_test = ntk(X), ntk(X, kind="nngp"), ntk(Z, X), ntk(Z, X, kind="nngp")
    step = t / n_steps
    alpha = torch.zeros_like(y)
    for _ in range(n_steps):
        alpha = (1 - step * lam) * alpha + step * y * (y * (K @ alpha) < 1)
    machine = decaying_ntk_descent(K, S, y, lam=lam, step=step, n_steps=n_steps)
    fixed = K_test @ alpha
    decaying = S_test.numpy() @ machine.last + (K_test - S_test).numpy() @ machine.hidden
    gaps = []
    for width in widths:
        rows = []
        for seed in range(seeds):
            network = NTKNetwork(64, width, generator=generator(seed))
            train_ntk_network(
                network, X.float(), y.float(), lam=lam, learning_rate=step, n_steps=n_steps
            )
            f = network(Z.float()).detach().double()
            rows.append([float((f - fixed).abs().max()), abs(f.numpy() - decaying).max()])
        gaps.append(np.mean(rows, axis=0))
    return np.array(gaps).T


def test_gap_to_the_fixed_kernel_closes_when_regularisation_has_not_acted():
    fixed, decaying = sup_gaps(lam=0.01, t=0.5, n_steps=40, widths=(64, 1024), seeds=2)
    slope = np.log(fixed[1] / fixed[0]) / np.log(16)
    assert -0.7 < slope < -0.3
    np.testing.assert_allclose(decaying, fixed, rtol=0.05)


def test_gap_to_the_fixed_kernel_stays_when_regularisation_has_acted():
    fixed, decaying = sup_gaps(lam=12.0, t=0.1, n_steps=40, widths=(64, 1024), seeds=2)
    assert fixed[1] > 0.8 * fixed[0]
    assert decaying[1] < 0.45 * decaying[0]
    assert decaying[1] < 0.35 * fixed[1]


@pytest.mark.slow
@pytest.mark.parametrize(("lam", "t"), [(0.01, 0.5), (12.0, 0.1)])
def test_width_sweep(lam, t):
    widths = (64, 128, 256, 512, 1024, 2048, 4096)
    fixed, decaying = sup_gaps(lam, t, n_steps=100, widths=widths, seeds=5)
    slopes = [np.polyfit(np.log(widths), np.log(gaps), 1)[0] for gaps in (fixed, decaying)]
    assert -0.6 < slopes[1] < -0.4
    assert (-0.6 < slopes[0] < -0.4) if lam * t < 0.01 else (abs(slopes[0]) < 0.1)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"K_ntk": np.ones((2, 3))}, "K_ntk must be a square"),
        ({"K_nngp": np.full((2, 2), np.nan)}, "K_nngp must be finite"),
        ({"K_nngp": np.eye(3)}, "same length"),
        ({"y": np.array([0.0, 1.0])}, "y must hold -1 and"),
        ({"loss": "huber"}, "loss"),
        ({"lam": -1.0}, "lam"),
        ({"lam": 100.0}, "step must be in"),
    ],
)
def test_decaying_descent_rejects(arguments, message):
    good = {"K_ntk": np.eye(2), "K_nngp": np.eye(2), "y": np.array([1.0, -1.0]), "lam": 1.0}
    with pytest.raises(ValueError, match=message):
        decaying_ntk_descent(**{**good, "step": 0.1, "n_steps": 1, **arguments})


def test_decaying_ntk_rejects():
    with pytest.raises(ValueError, match="lam"):
        decaying_ntk(np.eye(2), lam=-1.0, t=1.0)
    with pytest.raises(ValueError, match="t must be"):
        decaying_ntk(np.eye(2), lam=1.0, t=math.inf)
