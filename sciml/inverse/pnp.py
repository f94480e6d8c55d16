"""Plug-and-play ADMM in the order of the convergence theorem, and a check of its conditions.

To reconstruct x from y = A x + noise with the prior R of a proximal network f, iterate

    x = argmin_x  s ||A x - y||^2 + rho/2 ||x - (z - u)||^2
    u = u + x - z
    z = f(x + u)

which are deepinv's ADMM steps with the prior first. For a linear A, a smooth convex potential
with 0 < alpha < 1 and rho > 2 s ||A^T A||, x converges to a fixed point, whatever the
network's weights. The fixed points are the stationary points of s ||A x - y||^2 + rho R(x), so
that the theorem's bound on rho is one from below on the prior's weight too. It need not be: with
the proximal operator of w R for 0 < w < 1 in place of f, a proximal operator as well, the weight
is w rho and the theorem holds as it is.

References
----------
.. [1] Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse
   Problems", ICLR 2024, arXiv:2310.14344, Theorem 4.1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from deepinv.optim import ADMM, L2, PnP, Prior
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor, nn

from .._check import check_integer, check_interval
from .lpn import LearnedProximalNetwork
from .lpn_prior import LPNPrior

__all__ = ["ConvergenceCertificate", "convergence_certificate", "pnp_admm"]


class _WarmStartedPrior(LPNPrior):
    """The prior within one run of a solver: each inversion starts where the last one ended."""

    point: Tensor | None = None

    def prox(
        self,
        x: Tensor,
        *_: Any,
        gamma: float | Tensor = 1.0,
        init: Tensor | None = None,
        **__: Any,
    ) -> Tensor:
        z = super().prox(x, gamma=gamma, init=self.point if init is None else init)
        self.point = (x - (1 - gamma) * z) / gamma
        return z


def pnp_admm(
    y: Tensor,
    physics: LinearPhysics,
    net: nn.Module,
    rho: float = 1.1,
    scale: float = 0.5,
    weight: float = 1.0,
    max_iter: int = 100,
    init: Tensor | None = None,
    solver_tol: float = 1e-6,
    solver_max_iter: int = 100,
) -> tuple[Tensor, dict[str, list[list[float]]]]:
    """Reconstruct an image by plug-and-play ADMM, with deepinv's solver.

    Parameters
    ----------
    y : Tensor of shape (batch, ...)
        Measurements.
    physics : deepinv.physics.LinearPhysics
        Forward operator A.
    net : nn.Module
        Denoiser, called as ``net(x, None)``; the theorem wants a proximal network.
    rho : float, default=1.1
        Weight of the coupling, and so of the prior, whose own weight is part of the network.
        The theorem wants rho > 2 scale ||A^T A||; the paper's deblurring uses 0.1, which is
        less.
    scale : float, default=0.5
        s in the data term s ||A x - y||^2.
    weight : float, default=1.0
        w in the prior's weight w rho, in (0, 1]. At 1 the prior enters by the network itself,
        as in the paper. Below, by the proximal operator of w R, which wants a proximal network
        and an inversion, some evaluations more, an iteration: so a small weight of the prior
        keeps the guarantee, where a small `rho` loses it.
    max_iter : int, default=100
        Iterations.
    init : Tensor, default=None
        x_0; None is A^T y.
    solver_tol : float, default=1e-6
        Relative tolerance of conjugate gradients in the x-step (paper: 1e-5), where the
        physics has no closed form of it.
    solver_max_iter : int, default=100
        Iterations of conjugate gradients at most (paper: 30).

    Returns
    -------
    x : Tensor
        Reconstruction.
    metrics : dict
        deepinv's: ``metrics["residual"][i][k]`` is ||x_{k+1} - x_k|| / ||x_{k+1}|| of sample i.

    Raises
    ------
    TypeError
        If `physics` is not linear, or `net` no proximal network and `weight` below 1.
    ValueError
        If a number is out of range.

    Notes
    -----
    Under the theorem's conditions the augmented Lagrangian falls at every iteration, which is
    what its proof rests on. The residual goes to zero but need not fall at every one: it does
    where the proximal operator is a contraction, so where R is convex. A small `weight` brings
    the operator closer to that: its slope is 1 / (1 - w (1 - 1 / L)) at most where the network's
    is L > 1.

    References
    ----------
    .. [1] Fang, Buchanan and Sulam, arXiv:2310.14344, Algorithm 3 and Theorem 4.1.

    Examples
    --------
    >>> import torch, deepinv
    >>> from sciml.inverse import LearnedProximalNetwork, pnp_admm
    >>> net = LearnedProximalNetwork(1, image_size=8, width=4, strong_convexity=0.1)
    >>> physics = deepinv.physics.Inpainting((1, 8, 8), mask=0.5)
    >>> x, metrics = pnp_admm(torch.ones(2, 1, 8, 8), physics, net, max_iter=5)
    >>> x.shape, len(metrics["residual"][0])
    (torch.Size([2, 1, 8, 8]), 4)
    """
    if not isinstance(physics, LinearPhysics):
        raise TypeError(f"physics must be a deepinv LinearPhysics, got {type(physics).__name__}")
    check_interval("rho", rho, 0, closed="neither")
    check_interval("scale", scale, 0, closed="neither")
    check_interval("weight", weight, 0, 1, closed="right")
    check_interval("solver_tol", solver_tol, 0, closed="neither")
    check_integer("max_iter", max_iter, 1)
    check_integer("solver_max_iter", solver_max_iter, 1)
    stepsize = 2 * scale / rho
    was_training = net.training
    before = physics.solver, physics.max_iter, physics.tol
    try:
        prior: Prior = PnP(net.eval())
        if weight < 1:
            # The inversion cannot do better than the rounding of the network's output.
            prior = _WarmStartedPrior(net, tol=max(solver_tol, 100 * torch.finfo(y.dtype).eps))
        physics.set_ls_solver("CG", max_iter=solver_max_iter, tol=solver_tol)
        fidelity = L2()
        with torch.no_grad():
            x_0 = physics.A_adjoint(y) if init is None else init
            # z_0 = x_0 and u_0 = 0: deepinv's pair (x, z) is our (x_1, -u_1).
            x_1 = fidelity.prox(x_0, y, physics, gamma=stepsize)
            solver = ADMM(
                data_fidelity=fidelity,
                prior=prior,
                lambda_reg=weight / stepsize,  # deepinv asks for the prox of lambda_reg * stepsize
                stepsize=stepsize,
                beta=1.0,
                max_iter=max_iter - 1,
                g_first=True,
            )
            x, metrics = solver(y, physics, init=(x_1, x_0 - x_1), compute_metrics=True)
    finally:
        physics.solver, physics.max_iter, physics.tol = before
        net.train(was_training)
    return x, metrics


@dataclass(frozen=True)
class ConvergenceCertificate:
    """Which conditions of the convergence theorem hold.

    True in a boolean context if all do.

    Attributes
    ----------
    linear : bool
        A is linear.
    proximal : bool
        The network is the gradient of a potential and its constrained weights are not negative.
    alpha_in_range : bool
        0 < alpha < 1.
    rho_large_enough : bool
        rho > 2 scale ||A^T A||.
    operator_norm : float
        ||A^T A||, NaN if A is not linear.
    rho, alpha, scale : float
        The values checked.
    """

    linear: bool
    proximal: bool
    alpha_in_range: bool
    rho_large_enough: bool
    operator_norm: float
    rho: float
    alpha: float
    scale: float

    @property
    def holds(self) -> bool:
        """Whether all conditions hold."""
        return self.linear and self.proximal and self.alpha_in_range and self.rho_large_enough

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        need = 2 * self.scale * self.operator_norm
        lines = [
            (self.linear, "A is linear"),
            (self.proximal, "the network is a proximal operator"),
            (self.alpha_in_range, f"0 < alpha < 1 (alpha = {self.alpha:g})"),
            (
                self.rho_large_enough,
                f"rho > 2 scale ||A^T A|| (rho = {self.rho:g}, right side {need:.4g})",
            ),
        ]
        text = "\n".join(f"  {'yes' if ok else 'NO '}  {what}" for ok, what in lines)
        verdict = "PnP-ADMM converges" if self.holds else "convergence is not guaranteed"
        return f"{verdict}:\n{text}"


def convergence_certificate(
    physics: Physics,
    net: nn.Module,
    rho: float,
    alpha: float | None = None,
    scale: float = 0.5,
    img_size: tuple[int, ...] | None = None,
) -> ConvergenceCertificate:
    """Check the conditions under which `pnp_admm` provably converges.

    Parameters
    ----------
    physics : deepinv.physics.Physics
        Forward operator A.
    net : nn.Module
        Denoiser.
    rho : float
        Weight of the coupling.
    alpha : float, default=None
        Least slope of the network. None is 2 * net.strong_convexity, as the potential here
        holds c ||x||^2 where the paper writes alpha/2 ||x||^2.
    scale : float, default=0.5
        s in the data term s ||A x - y||^2 (theorem: 1/2).
    img_size : (int, ...), default=None
        Shape of one image, (C, H, W). None takes it from the network or the physics.

    Returns
    -------
    ConvergenceCertificate
        Each condition; truthy if all hold, and a list in `print`.

    Raises
    ------
    ValueError
        If `rho` or `scale` is not positive, or the image shape is unknown.

    Notes
    -----
    ||A^T A|| comes from deepinv's power iteration, which approaches it from below: leave
    `rho` a margin of some per cent. Linearity is tested on random images, besides the type.

    `pnp_admm`'s ``weight`` w < 1 changes none of the conditions: the proximal operator of w R
    has slope alpha / (alpha + w (1 - alpha)) at least, in (0, 1) if alpha is.

    References
    ----------
    .. [1] Fang, Buchanan and Sulam, arXiv:2310.14344, Theorem 4.1.

    Examples
    --------
    >>> import deepinv
    >>> from sciml.inverse import LearnedProximalNetwork, convergence_certificate
    >>> net = LearnedProximalNetwork(1, image_size=8, width=4, strong_convexity=0.01)
    >>> physics = deepinv.physics.Inpainting((1, 8, 8), mask=0.5)
    >>> print(convergence_certificate(physics, net, rho=0.5))
    convergence is not guaranteed:
      yes  A is linear
      yes  the network is a proximal operator
      yes  0 < alpha < 1 (alpha = 0.02)
      NO   rho > 2 scale ||A^T A|| (rho = 0.5, right side 1)
    """
    check_interval("rho", rho, 0, closed="neither")
    check_interval("scale", scale, 0, closed="neither")
    is_convex = getattr(net, "is_convex", None)
    proximal = callable(is_convex) and callable(getattr(net, "potential", None)) and is_convex()
    if alpha is None:
        alpha = 2 * float(getattr(net, "strong_convexity", 0.0))
    check_interval("alpha", alpha)
    if img_size is None:
        if isinstance(net, LearnedProximalNetwork):
            img_size = (net.in_channels, *net.image_size)
        else:
            img_size = getattr(physics, "img_size", None)
    if img_size is None:
        raise ValueError("img_size must be given as (C, H, W): net and physics do not tell it")
    own = next(net.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, *img_size, generator=generator, dtype=own.dtype).to(own.device)
    norm = float("nan")
    linear = isinstance(physics, LinearPhysics)
    # deepinv's power iteration draws its start from torch's global generator.
    cuda = [own.device] if own.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)
        if linear:
            apart, together = physics.A(a) + physics.A(b), physics.A(a + b)
            error = (together - apart).norm() / together.norm().clamp(min=1e-12)
            linear = bool(error < 1e-3)
        if linear:
            norm = float(physics.compute_sqnorm(a, max_iter=1000, tol=1e-6, verbose=False))
    return ConvergenceCertificate(
        linear=linear,
        proximal=bool(proximal),
        alpha_in_range=bool(0 < alpha < 1),
        rho_large_enough=bool(rho > 2 * scale * norm),
        operator_norm=norm,
        rho=float(rho),
        alpha=float(alpha),
        scale=float(scale),
    )
