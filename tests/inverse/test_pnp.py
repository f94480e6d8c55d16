"""PnP-ADMM against its own recursion, all kinds of deepinv physics, and the certificate."""

import deepinv
import numpy as np
import pytest
import torch
from deepinv.physics.functional.blur import gaussian_blur

from sciml.inverse import (
    ConvergenceCertificate,
    FullyConnectedLPN,
    LearnedProximalNetwork,
    LPNPrior,
    PatchLPN,
    convergence_certificate,
    pnp_admm,
)


def network(strong_convexity=0.2, weight=0.05):
    generator = torch.Generator().manual_seed(0)
    net = LearnedProximalNetwork(
        1, 8, width=5, beta=10.0, strong_convexity=strong_convexity, generator=generator
    )
    with torch.no_grad():
        for parameter in net.constrained_weights().values():
            parameter.uniform_(0, weight, generator=generator)
    return net.double().eval()


def rng():
    return torch.Generator().manual_seed(0)


PHYSICS = {
    "blur": lambda: deepinv.physics.Blur(
        filter=gaussian_blur(sigma=(1.0, 1.0), dtype=torch.float64), padding="circular"
    ),
    "blur by FFT": lambda: deepinv.physics.BlurFFT(
        (1, 8, 8), filter=gaussian_blur(sigma=(1.0, 1.0), dtype=torch.float64)
    ),
    "inpainting": lambda: deepinv.physics.Inpainting((1, 8, 8), mask=0.6, rng=rng()),
    "compressed sensing": lambda: deepinv.physics.CompressedSensing(
        m=30, img_size=(1, 8, 8), dtype=torch.float64, rng=rng()
    ),
    "structured random": lambda: deepinv.physics.StructuredRandom(
        (1, 8, 8), (1, 4, 8), n_layers=2, rng=rng()
    ),
    "tomography": lambda: deepinv.physics.Tomography(
        angles=12, img_width=8, circle=False, normalize=True
    ),
}


def dtype_of(name):
    """All in float64, but deepinv's tomography, which computes in float32."""
    return torch.float32 if name == "tomography" else torch.float64


def dense_matrix(physics, dtype=torch.float64):
    basis = torch.eye(64, dtype=dtype).reshape(64, 1, 8, 8)
    return physics.A(basis).reshape(64, -1).T


def images(n=2):
    return torch.rand(n, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PHYSICS)
def test_every_linear_physics_is_adjoint_and_converges(name):
    dtype = dtype_of(name)
    physics = PHYSICS[name]()
    assert physics.adjointness_test(img_size=(1, 8, 8), dtype=dtype) < 1e-5
    net, y = network().to(dtype), physics.A(images().to(dtype))
    norm = convergence_certificate(physics, net, rho=1.0).operator_norm
    rho = 1.2 * norm
    certificate = convergence_certificate(physics, net, rho)
    assert certificate.holds, str(certificate)
    x, metrics = pnp_admm(
        y, physics, net, rho=rho, max_iter=100, solver_tol=1e-8, solver_max_iter=30
    )
    assert x.shape == (2, 1, 8, 8)
    residual = np.array(metrics["residual"])
    assert residual.shape == (2, 99)
    assert residual[:, -1].max() < 1e-5
    assert residual[:, -1].max() < 1e-2 * residual[:, 0].max()
    # Stationary where x = f(x + u) and 2 s A^T (A x - y) + rho u = 0.
    u = -physics.A_adjoint(physics.A(x) - y) / rho
    torch.testing.assert_close(net(x + u), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("scale", "rho"), [(0.5, 1.3), (2.0, 0.7)])
@pytest.mark.parametrize(
    ("name", "atol"),
    # Closed form of the x-step, and deepinv's conjugate gradients, which guard their
    # quotients with 1e-8.
    [("blur by FFT", 1e-9), ("compressed sensing", 3e-5)],
)
def test_equals_the_recursion_written_out(name, atol, scale, rho):
    physics = PHYSICS[name]()
    matrix = dense_matrix(physics)
    net, x_true = network(), images()
    y = physics.A(x_true)
    normal = 2 * scale * matrix.T @ matrix + rho * torch.eye(64, dtype=torch.float64)
    z = physics.A_adjoint(y)
    u = torch.zeros_like(z)
    for k in range(1, 8):
        right = 2 * scale * y.flatten(1) @ matrix + rho * (z - u).flatten(1)
        x = torch.linalg.solve(normal, right.T).T.reshape(z.shape)
        u = u + x - z
        z = net(x + u)
        got, _ = pnp_admm(
            y, physics, net, rho, scale, max_iter=k, solver_tol=1e-12, solver_max_iter=300
        )
        torch.testing.assert_close(got, x, rtol=0, atol=atol)


def lagrangians(physics, net, rho, y, max_iter):
    """Augmented Lagrangian after each z-step of the recursion, and ||x - z||, in x alone."""
    values, residuals = [], []
    for k in range(1, max_iter):
        x, _ = pnp_admm(y, physics, net, rho, max_iter=k, solver_tol=1e-12, solver_max_iter=60)
        misfit = physics.A(x) - y
        u = -physics.A_adjoint(misfit) / rho
        v, x, u, misfit = (t.flatten(1) for t in (x + u, x, u, misfit))
        with torch.no_grad():
            z = net(v.reshape(-1, 1, 8, 8)).flatten(1)
            psi = net.potential(v.reshape(-1, 1, 8, 8))
        prior = (v * z).sum(1) - z.square().sum(1) / 2 - psi  # R(f(v)), without an inversion
        coupling = (u * (x - z)).sum(1) + (x - z).square().sum(1) / 2
        values.append(misfit.square().sum(1) / 2 + rho * (prior + coupling))
        residuals.append((x - z).norm(dim=1))
    return torch.stack(values), torch.stack(residuals)


@pytest.mark.parametrize("name", ["blur by FFT", "inpainting"])
def test_lagrangian_falls_at_every_step_if_rho_exceeds_the_norm(name):
    # The merit function of the proof: its change in the x- and u-steps is
    # -dx^T (rho - H) (rho + 2 H) dx / (2 rho) with H = A^T A.
    physics, net = PHYSICS[name](), network(0.02, weight=0.2)
    jacobian = torch.autograd.functional.jacobian(net, images(1)).reshape(64, 64)
    assert torch.linalg.eigvalsh(jacobian)[-1] > 1.5, "R is convex: the test would see little"
    y, norm = physics.A(images()), float(torch.linalg.matrix_norm(dense_matrix(physics), 2)) ** 2
    falling, residual = lagrangians(physics, net, 1.02 * norm, y, max_iter=12)
    assert (falling.diff(dim=0) < 0).all()
    # The residual itself need not fall where R is not convex.
    assert (residual.diff(dim=0) > 0).any()
    rising, _ = lagrangians(physics, net, 0.7 * norm, y, max_iter=12)
    assert (rising.diff(dim=0) > 0).any()


def test_small_weight_keeps_rho_large_and_reaches_the_same_stationary_point():
    physics, net = PHYSICS["blur by FFT"](), network()
    y = physics.A(images())
    options = {"max_iter": 60, "solver_tol": 1e-9}
    x, metrics = pnp_admm(y, physics, net, rho=1.2, weight=0.25, **options)
    assert np.array(metrics["residual"])[:, -1].max() < 1e-6
    # A^T (A x - y) + w rho R'(x) = 0.
    slope = physics.A_adjoint(physics.A(x) - y) + 0.25 * 1.2 * LPNPrior(net, tol=1e-11).grad(x)
    assert float(slope.norm()) < 1e-5
    # R of this network is convex, so a small rho must lead to the same point.
    other, _ = pnp_admm(y, physics, net, rho=0.3, **options)
    torch.testing.assert_close(x, other, rtol=0, atol=1e-5)
    dncnn = deepinv.models.DnCNN(1, 1, depth=3, nf=4, pretrained=None).double()
    with pytest.raises(TypeError, match="proximal network"):
        pnp_admm(y, physics, dncnn.train(), weight=0.5)
    assert dncnn.training
    assert dncnn.training


def test_small_weight_in_float32_draws_no_warning(recwarn):
    physics, net = PHYSICS["inpainting"](), network().float()
    y = physics.A(images().float())
    _, metrics = pnp_admm(y, physics, net, rho=1.2, weight=0.1, max_iter=30)
    residual = np.array(metrics["residual"])
    assert residual[:, -1].max() < 0.01 * residual[:, 0].max()
    assert not [w for w in recwarn if "inversion" in str(w.message)]


def test_start_and_restored_state():
    physics = PHYSICS["compressed sensing"]()
    before = physics.solver, physics.max_iter, physics.tol
    net = network().train()
    y = physics.A(images())
    start = images().flip(0)
    a, _ = pnp_admm(y, physics, net, max_iter=2)
    b, _ = pnp_admm(y, physics, net, max_iter=2, init=start)
    assert not torch.allclose(a, b)
    assert net.training
    assert (physics.solver, physics.max_iter, physics.tol) == before


def test_patches_reconstruct_a_larger_image():
    net = PatchLPN(network(), overlap=4)
    physics = deepinv.physics.BlurFFT(
        (1, 12, 20), filter=gaussian_blur(sigma=(1.0, 1.0), dtype=torch.float64)
    )
    x = torch.rand(1, 1, 12, 20, dtype=torch.float64, generator=rng())
    certificate = convergence_certificate(physics, net, rho=1.2, img_size=(1, 12, 20))
    assert certificate.holds
    _, metrics = pnp_admm(physics.A(x), physics, net, rho=1.2, max_iter=150)
    assert metrics["residual"][0][-1] < 1e-6


@pytest.mark.parametrize("name", PHYSICS)
def test_operator_norm_equals_the_dense_one(name):
    dtype = dtype_of(name)
    physics = PHYSICS[name]()
    exact = float(torch.linalg.matrix_norm(dense_matrix(physics, dtype), 2)) ** 2
    got = convergence_certificate(physics, network().to(dtype), rho=1.0).operator_norm
    assert got == pytest.approx(exact, rel=0.01)


def test_certificate_names_the_condition_that_fails():
    physics = PHYSICS["inpainting"]()
    good = convergence_certificate(physics, network(0.2), rho=1.1)
    assert isinstance(good, ConvergenceCertificate)
    assert good
    assert str(good).startswith("PnP-ADMM converges")
    cases = {
        "rho_large_enough": convergence_certificate(physics, network(0.2), rho=0.9),
        "alpha_in_range": convergence_certificate(physics, network(0.5), rho=1.1),
    }
    zero = convergence_certificate(physics, network(0.2), rho=1.1, alpha=0.0)
    assert not zero.alpha_in_range
    broken = network()
    with torch.no_grad():
        broken.lin[1].weight[0, 0, 0, 0] = -1e-3
    cases["proximal"] = convergence_certificate(physics, broken, rho=1.1)
    for field, certificate in cases.items():
        assert not certificate
        checks = ("linear", "proximal", "alpha_in_range", "rho_large_enough")
        assert [name for name in checks if not getattr(certificate, name)] == [field]
        assert "not guaranteed" in str(certificate)
        assert str(certificate).count("NO ") == 1
    # alpha is the slope, twice the coefficient of ||x||^2; scale enters the bound on rho.
    assert cases["alpha_in_range"].alpha == 1.0
    assert not convergence_certificate(physics, network(0.2), rho=1.1, scale=1.0)
    assert convergence_certificate(physics, network(0.2), rho=2.1, scale=1.0)


def test_certificate_refuses_other_networks_and_nonlinear_operators():
    physics = PHYSICS["inpainting"]()
    dncnn = deepinv.models.DnCNN(1, 1, depth=3, nf=4, pretrained=None).double()
    assert not convergence_certificate(physics, dncnn, rho=1.1, alpha=0.1).proximal
    nonlinear = deepinv.physics.Physics(A=lambda x, **_: x**2)
    certificate = convergence_certificate(nonlinear, network(), rho=1.1)
    assert not certificate.linear
    assert np.isnan(certificate.operator_norm)
    affine = deepinv.physics.LinearPhysics(A=lambda x, **_: x + 1, A_adjoint=lambda y, **_: y)
    assert not convergence_certificate(affine, network(), rho=1.1).linear


def test_certificate_is_reproducible_and_leaves_the_global_generator_alone():
    physics = PHYSICS["blur"]()
    torch.manual_seed(5)
    net = network()
    state = torch.get_rng_state()
    norms = {convergence_certificate(physics, net, 1.0).operator_norm for _ in range(2)}
    assert len(norms) == 1
    assert torch.equal(torch.get_rng_state(), state)


Y = torch.ones(1, 1, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p, n: pnp_admm(Y, deepinv.physics.Physics(lambda x: x), n), TypeError, "Linear"),
        (lambda p, n: pnp_admm(Y, p, n, rho=0.0), ValueError, "rho"),
        (lambda p, n: pnp_admm(Y, p, n, scale=-1.0), ValueError, "scale"),
        (lambda p, n: pnp_admm(Y, p, n, weight=0.0), ValueError, "weight"),
        (lambda p, n: pnp_admm(Y, p, n, weight=1.5), ValueError, "weight"),
        (lambda p, n: pnp_admm(Y, p, n, max_iter=0), ValueError, "max_iter"),
        (lambda p, n: pnp_admm(Y, p, n, solver_tol=0.0), ValueError, "solver_tol"),
        (lambda p, n: pnp_admm(Y * torch.nan, p, n), ValueError, "finite"),
        (lambda p, n: convergence_certificate(p, n, rho=-1.0), ValueError, "rho"),
        (lambda p, n: convergence_certificate(p, n, 1.0, alpha=float("nan")), ValueError, "alpha"),
        (
            lambda p, n: convergence_certificate(PHYSICS["blur"](), FullyConnectedLPN(64), 1.0),
            ValueError,
            "img_size",
        ),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call(PHYSICS["inpainting"](), network())
