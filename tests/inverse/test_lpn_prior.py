"""Inversion and the learned prior against closed forms, SciPy and its own definition."""

import numpy as np
import pytest
import torch
from deepinv.optim import L2, PGD
from deepinv.physics import Denoising, GaussianNoise
from scipy.optimize import fmin_cg

from sciml.inverse import (
    FullyConnectedLPN,
    LearnedProximalNetwork,
    LPNPrior,
    PatchLPN,
    ProximalOperator,
    invert,
)


def dense(strong_convexity=0.05, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = FullyConnectedLPN(
        d, hidden=20, n_layers=2, strong_convexity=strong_convexity, generator=generator
    )
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(2)
    return net.double().eval()


def points(n=6, d=5, seed=1, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, dtype=torch.float64, generator=generator)


def quadratic(matrix, strong_convexity=0.0):
    """f(y) = (matrix + 2 c) y."""
    return ProximalOperator(lambda y: ((y @ matrix) * y).sum(1) / 2, strong_convexity)


@pytest.mark.parametrize("method", ["lbfgs", "cg"])
@pytest.mark.parametrize(
    "make", [dense, lambda: PatchLPN(conv(), overlap=4)], ids=["dense", "patches"]
)
def test_inverse_undoes_the_network(method, make):
    net = make()
    y = points() if isinstance(net, FullyConnectedLPN) else images(2, 12)
    result = invert(net, net(y), method=method, tol=1e-10, max_iter=2000)
    assert result.converged.all()
    torch.testing.assert_close(result.y, y, rtol=1e-6, atol=1e-6)
    residual = (net(result.y) - net(y)).flatten(1).norm(dim=1) / net(y).flatten(1).norm(dim=1)
    torch.testing.assert_close(result.residual, residual, rtol=1e-6, atol=1e-14)


def conv():
    generator = torch.Generator().manual_seed(0)
    net = LearnedProximalNetwork(1, 8, width=5, strong_convexity=0.05, generator=generator)
    with torch.no_grad():
        for weight in net.constrained_weights().values():
            weight.uniform_(0, 0.1, generator=generator)
    return net.double().eval()


def images(n, side=8):
    generator = torch.Generator().manual_seed(2)
    return torch.rand(n, 1, side, side, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("method", ["lbfgs", "cg"])
def test_quadratic_has_the_closed_form(method):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    matrix = root @ root.T / 8
    net = quadratic(matrix, 0.02)
    full = matrix + 0.04 * torch.eye(8, dtype=torch.float64)
    x = points(5, 8)
    y = torch.linalg.solve(full, x.T).T
    result = invert(net, x, method=method, tol=1e-11, max_iter=500)
    torch.testing.assert_close(result.y, y, rtol=1e-7, atol=1e-7)
    # R(x) = x^T (F^-1 - I) x / 2.
    expected = ((y - x) * x).sum(1) / 2
    prior = LPNPrior(net, method=method, tol=1e-10)
    torch.testing.assert_close(prior.fn(x), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(prior.grad(x), y - x, rtol=1e-6, atol=1e-6)


def test_conjugate_gradients_end_after_as_many_steps_as_eigenvalues():
    matrix = torch.diag(torch.tensor([1.0, 1.0, 4.0, 4.0, 9.0], dtype=torch.float64))
    result = invert(quadratic(matrix, 1e-12), points(3), method="cg", tol=1e-5, max_iter=30)
    assert result.converged.all()
    assert result.n_iter <= 8  # three in exact line searches


def test_samples_of_a_batch_do_not_influence_each_other():
    net, x = dense(), dense()(points(4))
    together = invert(net, x, tol=1e-9)
    for k in range(4):
        alone = invert(net, x[k : k + 1], tol=1e-9)
        torch.testing.assert_close(together.y[k : k + 1], alone.y, rtol=1e-6, atol=1e-6)


def test_agrees_with_scipys_conjugate_gradients():
    net, x = dense(), points(3, scale=0.5)
    prior = LPNPrior(net, tol=1e-9)
    for k in range(3):
        target = x[k : k + 1]

        def value(y, target=target):
            y = torch.tensor(y)[None]
            return float((net.potential(y) - (y * target).sum(1)).detach())

        def gradient(y, target=target):
            return (net(torch.tensor(y)[None]) - target)[0].numpy()

        y = fmin_cg(value, x[k].numpy(), gradient, gtol=1e-8, disp=False)
        expected = y @ x[k].numpy() - 0.5 * float(x[k] @ x[k])
        expected -= float(net.potential(torch.tensor(y)[None]).detach())
        np.testing.assert_allclose(float(prior.fn(target)), expected, rtol=1e-7, atol=1e-9)


def test_zero_weights_give_the_closed_form_prior():
    # f(y) = 2 a y, R(x) = (1 / (4 a) - 1 / 2) ||x||^2: zero for a = 1/2.
    x = points(4)
    for a in (0.5, 0.1, 0.9):
        net = quadratic(torch.zeros(5, 5, dtype=torch.float64), a)
        expected = (1 / (4 * a) - 0.5) * x.square().sum(1)
        torch.testing.assert_close(LPNPrior(net, tol=1e-12).fn(x), expected, rtol=1e-9, atol=1e-9)


def test_fenchel_value_at_images_of_the_network():
    net, y = dense(), points()
    with torch.no_grad():
        x, psi = net(y), net.potential(y)
    expected = (y * x).sum(1) - x.square().sum(1) / 2 - psi
    torch.testing.assert_close(LPNPrior(net, tol=1e-10).fn(x), expected, rtol=1e-9, atol=1e-9)


def test_prior_forgives_an_inexact_inverse():
    net, x = dense(), dense()(points())
    exact = LPNPrior(net, tol=1e-12, max_iter=3000).fn(x)
    rough = LPNPrior(net, tol=1e-3).fn(x)
    assert float((rough - exact).abs().max()) < 1e-4 * float(exact.abs().max())


def test_gradient_equals_finite_differences_and_autograd():
    net = dense()
    x, v = net(points(3)), points(3, seed=5)
    prior = LPNPrior(net, tol=1e-12, max_iter=3000)
    step = 1e-4
    difference = (prior.fn(x + step * v) - prior.fn(x - step * v)) / (2 * step)
    torch.testing.assert_close((prior.grad(x) * v).sum(1), difference, rtol=1e-5, atol=1e-6)
    point = x.clone().requires_grad_()
    (automatic,) = torch.autograd.grad(prior.fn(point).sum(), point)
    torch.testing.assert_close(automatic, prior.grad(x))
    assert not x.requires_grad


def test_prox_at_gamma_one_is_the_network():
    net, y = dense(), points()
    assert torch.equal(LPNPrior(net).prox(y, 0.05, gamma=1.0), net(y))
    assert torch.equal(LPNPrior(net).prox(y, gamma=torch.tensor(1.0)), net(y))


@pytest.mark.parametrize("gamma", [0.9, 0.3, 0.05])
def test_prox_below_one_minimises_its_problem(gamma):
    net, y = dense(), points()
    prior = LPNPrior(net, tol=1e-11, max_iter=3000)
    x = prior.prox(y, gamma=gamma)
    # Stationary: gamma R'(x) + x - y = 0.
    torch.testing.assert_close(gamma * prior.grad(x) + x, y, rtol=1e-5, atol=1e-5)
    cost = gamma * prior.fn(x) + (x - y).square().sum(1) / 2
    for seed in range(5):
        other = x + points(6, seed=seed, scale=0.1)
        rival = gamma * prior.fn(other) + (other - y).square().sum(1) / 2
        assert (cost <= rival + 1e-9).all()


def test_prox_starts_where_it_is_told(monkeypatch):
    net, y = dense(), points()
    calls = []
    forward = net.forward
    monkeypatch.setattr(net, "forward", lambda x, s=None: calls.append(0) or forward(x, s))
    prior = LPNPrior(net, tol=1e-8)
    cold = prior.prox(y, gamma=0.3)
    n_cold = len(calls)
    calls.clear()
    warm = prior.prox(y, gamma=0.3, init=(y - 0.7 * cold) / 0.3)
    assert len(calls) < n_cold / 3
    torch.testing.assert_close(warm, cold, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="init"):
        prior.prox(y, gamma=0.3, init=y[:2])


@pytest.mark.parametrize("gamma", [1.5, 0.0, -1.0])
def test_prox_refuses_other_weights(gamma):
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\].*lambda_reg"):
        LPNPrior(dense()).prox(points(), gamma=gamma)


def test_deepinvs_solver_lowers_the_explicit_cost():
    # min ||x - y||^2 / 2 + 2 R(x) by proximal gradient descent, its cost evaluated by deepinv.
    net = conv()
    prior = LPNPrior(net, explicit_prior=True, tol=1e-8)
    assert prior.explicit_prior
    solver = PGD(
        data_fidelity=L2(), prior=prior, stepsize=0.5, lambda_reg=2.0, max_iter=8, g_param=0.1
    )
    y = images(1)
    x, metrics = solver(y, Denoising(GaussianNoise(0.1)), compute_metrics=True)
    assert (np.diff(metrics["cost"][0]) <= 1e-9).all()
    expected = (x - y).square().sum() / 2 + 2 * prior.fn(x)[0]
    assert metrics["cost"][0][-1] == pytest.approx(float(expected), rel=1e-5)
    assert not LPNPrior(net).explicit_prior


def test_out_of_range_warns_with_the_residual():
    # f(y) = softplus'-like map into (0, 1): 2 is out of its reach.
    net = ProximalOperator(lambda y: torch.nn.functional.softplus(y).sum(1))
    x = torch.tensor([[0.3], [2.0]], dtype=torch.float64)
    with pytest.warns(RuntimeWarning) as record:
        result = invert(net, x, max_iter=50)
    messages = " ".join(str(w.message) for w in record)
    assert "strong_convexity=0" in messages
    assert "1 of 2 samples" in messages
    assert "range" in messages
    assert result.converged.tolist() == [True, False]
    assert float(result.residual[1]) >= 0.5 - 1e-9
    with pytest.warns(RuntimeWarning) as record:
        LPNPrior(net, max_iter=50).fn(x)
    assert any("worst relative residual 5.0" in str(w.message) for w in record)


def test_zero_image_and_start():
    net = dense()
    zero = torch.zeros(1, 5, dtype=torch.float64)
    result = invert(net, zero, tol=1e-8)
    assert float(net(result.y).norm()) < 1e-8
    again = invert(net, zero, tol=1e-8, init=result.y)
    assert again.n_iter == 0
    nearly = invert(net.float(), zero.float() + 2e-8, tol=1e-5)  # zero, but for rounding
    assert nearly.converged.all()


def test_float32_reaches_a_float32_tolerance():
    net = conv().float()
    x = images(4).float()
    result = invert(net, x, tol=1e-5, max_iter=500)
    assert result.y.dtype == torch.float32
    assert result.converged.all()


def broken():
    net = dense()
    with torch.no_grad():
        net.lin[1].weight[0, 0] = -1
    return net


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: invert(dense(), points(), method="newton"), ValueError, "method.*newton"),
        (lambda: invert(dense(), points(), tol=0.0), ValueError, "tol"),
        (lambda: invert(dense(), points(), max_iter=0), ValueError, "max_iter"),
        (lambda: invert(dense(), points() * torch.nan), ValueError, "finite"),
        (lambda: invert(dense(), points(6, 4)), ValueError, r"\(batch, 5\)"),
        (lambda: invert(dense(), points(), init=points(2)), ValueError, "init"),
        (lambda: invert(torch.nn.Linear(5, 5), points()), TypeError, "ProximalOperator"),
        (lambda: invert(broken(), points()), ValueError, "project_"),
        (lambda: LPNPrior(broken()), ValueError, "project_"),
        (lambda: LPNPrior(torch.nn.Linear(5, 5)), TypeError, "proximal network"),
        (lambda: LPNPrior(dense(), method="sgd"), ValueError, "method"),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()
