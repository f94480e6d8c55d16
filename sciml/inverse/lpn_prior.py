"""Invert a proximal network and so evaluate the prior it has learned.

With psi the network's convex potential and f its gradient, the function R of which f is the
proximal operator is, up to a constant,

    R(x) = <y, x> - ||x||^2 / 2 - psi(y),   where f(y) = x,

and its gradient is y - x. The point y is the minimiser of the convex function
psi(y) - <x, y>, unique if psi is strongly convex. All samples of a batch are solved at once,
each with its own step lengths.

References
----------
.. [1] Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse
   Problems", ICLR 2024, arXiv:2310.14344, Section 3.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from deepinv.optim import Prior
from torch import Tensor, nn

from .._check import check_choice, check_integer, check_interval

__all__ = ["Inversion", "LPNPrior", "invert"]

Field = Callable[[Tensor], Tensor]


class Inversion(NamedTuple):
    """Points y with f(y) = x, and how well that holds.

    Attributes
    ----------
    y : Tensor of the shape of x
        The points.
    residual : Tensor of shape (batch,)
        ||f(y) - x|| / ||x||, absolute where x is zero up to rounding.
    converged : Tensor of shape (batch,), bool
        Whether the residual came below the tolerance.
    n_iter : int
        Iterations of the slowest sample.
    """

    y: Tensor
    residual: Tensor
    converged: Tensor
    n_iter: int


def invert(
    net: nn.Module,
    x: Tensor,
    method: str = "lbfgs",
    tol: float = 1e-5,
    max_iter: int = 500,
    init: Tensor | None = None,
) -> Inversion:
    """Compute y with f(y) = x by minimising the convex function psi(y) - <x, y>.

    Parameters
    ----------
    net : nn.Module
        Proximal network with ``potential``, such as `LearnedProximalNetwork`.
    x : Tensor of shape (batch, ...)
        Points in the range of the network.
    method : {"lbfgs", "cg"}, default="lbfgs"
        Limited-memory BFGS, or nonlinear conjugate gradients (Polak-Ribiere), both batched.
        The published code runs SciPy's conjugate gradients one sample at a time.
    tol : float, default=1e-5
        Relative residual to reach, per sample.
    max_iter : int, default=500
        Iterations at most.
    init : Tensor of the shape of `x`, default=None
        Start; None is `x` itself.

    Returns
    -------
    Inversion
        Points, residuals, whether each converged, and iterations.

    Warns
    -----
    RuntimeWarning
        If a sample did not converge, which is what happens to an `x` outside the range of
        the network, with the worst residual; if the potential is not strongly convex, so
        that y need not be unique.

    Raises
    ------
    TypeError, ValueError
        If `net` is no proximal network or violates its constraint, or `x` is not a valid input.

    References
    ----------
    .. [1] Fang, Buchanan and Sulam, arXiv:2310.14344, Section 3.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse import FullyConnectedLPN, invert
    >>> net = FullyConnectedLPN(3, strong_convexity=0.1).eval()
    >>> y = torch.linspace(-1, 1, 6).reshape(2, 3)
    >>> torch.allclose(invert(net, net(y)).y, y, atol=1e-3)
    True
    """
    _check_net(net)
    check_choice("method", method, ("lbfgs", "cg"))
    check_interval("tol", tol, 0, closed="neither")
    check_integer("max_iter", max_iter, 1)
    net.check_input(x)  # type: ignore[operator]
    if init is not None and init.shape != x.shape:
        raise ValueError(f"init must have the shape {tuple(x.shape)} of x, got {init.shape}")
    if not net.strong_convexity > 0:  # type: ignore[operator]
        warnings.warn(
            "net has strong_convexity=0: the inverse need not exist or be unique",
            RuntimeWarning,
            stacklevel=2,
        )
    return _solve(net, x, x if init is None else init, method, tol, max_iter)


class LPNPrior(Prior):
    r"""The function R of which a proximal network is the proximal operator, for deepinv's solvers.

    A solver asks for the proximal operator of gamma R. It is one evaluation of the network
    for gamma = 1, and a convex problem for gamma < 1; for gamma > 1 it need not be unique
    and is refused. So with step size t set the solver's ``lambda_reg = 1 / t``: then gamma
    is 1, and the cost it reports is :math:`f(x) + R(x) / t`.

    Parameters
    ----------
    net : nn.Module
        Proximal network with ``potential``; used in evaluation mode.
    explicit_prior : bool, default=False
        Whether solvers shall evaluate the cost, which takes one inversion an iteration.
    method : {"lbfgs", "cg"}, default="lbfgs"
        How to invert.
    tol : float, default=1e-5
        Relative residual of the inversion.
    max_iter : int, default=500
        Iterations of the inversion.

    Notes
    -----
    R is defined up to a constant: compare values, as in R(noisy) - R(clean). Because the
    minimum is flat, an error e in y changes R by the order of e^2 only.

    References
    ----------
    .. [1] Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse
       Problems", ICLR 2024, arXiv:2310.14344, Section 3.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse import LPNPrior, ProximalOperator
    >>> net = ProximalOperator(lambda y: 0 * y.sum(1), strong_convexity=0.25)  # f(y) = y / 2
    >>> LPNPrior(net).fn(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))  # R(x) = ||x||^2 / 2
    tensor([2., 8.])
    """

    def __init__(
        self,
        net: nn.Module,
        explicit_prior: bool = False,
        method: str = "lbfgs",
        tol: float = 1e-5,
        max_iter: int = 500,
    ) -> None:
        super().__init__()
        _check_net(net)
        check_choice("method", method, ("lbfgs", "cg"))
        check_interval("tol", tol, 0, closed="neither")
        check_integer("max_iter", max_iter, 1)
        self.net = net.eval()
        self.explicit_prior = explicit_prior
        self.method = method
        self.tol = tol
        self.max_iter = max_iter

    def fn(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Compute R(x) by inverting the network.

        Differentiable in `x`. Further arguments, which deepinv's solvers hand to every
        prior, have no effect.

        Parameters
        ----------
        x : Tensor of shape (batch, ...)
            Points in the range of the network; others draw a warning with the residual.

        Returns
        -------
        Tensor of shape (batch,)
            R(x), up to one constant for all x.
        """
        y = self._inverse(x)
        with torch.no_grad():
            psi = self.net.potential(y)  # type: ignore[operator]
        # With y held fixed the derivative in x is y - x, the gradient of R.
        flat = x.flatten(1)
        return (y.flatten(1) * flat).sum(1) - flat.square().sum(1) / 2 - psi

    def grad(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Compute the gradient of R at `x`, which is y - x with f(y) = x.

        Parameters
        ----------
        x : Tensor of shape (batch, ...)
            Points in the range of the network.

        Returns
        -------
        Tensor of the shape of `x`
            The gradient.
        """
        return self._inverse(x) - x.detach()

    def prox(
        self,
        x: Tensor,
        *_: Any,
        gamma: float | Tensor = 1.0,
        init: Tensor | None = None,
        **__: Any,
    ) -> Tensor:
        """Compute the proximal operator of gamma R at `x`.

        Parameters
        ----------
        x : Tensor of shape (batch, ...)
            Points.
        gamma : float, default=1.0
            Weight, in (0, 1]. At 1 the network itself; below, v with
            gamma v + (1 - gamma) f(v) = x is sought and f(v) returned.
        init : Tensor of the shape of `x`, default=None
            Where the search for v starts; None is `x`. From a result z at a nearby x one gets
            a good start, (x - (1 - gamma) z) / gamma.

        Returns
        -------
        Tensor of the shape of `x`
            The proximal operator.

        Raises
        ------
        ValueError
            If `gamma` is not in (0, 1], or `init` is of another shape than `x`.
        """
        weight = float(gamma)
        if abs(weight - 1) < 1e-6:
            return self.net(x)
        if not 0 < weight < 1:
            raise ValueError(
                f"gamma must be in (0, 1], got {weight}: for larger weights the proximal operator "
                "need not be unique. In a deepinv solver set lambda_reg = 1 / stepsize, which "
                "asks for gamma = 1, and weight the data term by the step size"
            )
        self.net.check_input(x)  # type: ignore[operator]

        def rescaled(v: Tensor) -> Tensor:
            return weight * v + (1 - weight) * self.net(v)

        start = x if init is None else init
        if start.shape != x.shape:
            raise ValueError(f"init must have the shape {tuple(x.shape)} of x, got {start.shape}")
        v = _solve(rescaled, x, start, self.method, self.tol, self.max_iter).y
        return self.net(v)

    def _inverse(self, x: Tensor) -> Tensor:
        return invert(self.net, x.detach(), self.method, self.tol, self.max_iter).y


def _check_net(net: nn.Module) -> None:
    """Raise unless `net` is the gradient of a potential that its weights keep convex."""
    for name in ("potential", "check_input", "is_convex"):
        if not callable(getattr(net, name, None)):
            raise TypeError(
                f"net must be a proximal network with a method {name}, got {type(net).__name__}; "
                "ProximalOperator makes one of any convex module"
            )
    if not net.is_convex():  # type: ignore[operator]
        raise ValueError("net must have no negative constrained weights; call net.project_()")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the samples, (batch, n) with (batch, n)."""
    return (a * b).sum(1)


@torch.no_grad()
def _solve(
    field: Field, x: Tensor, start: Tensor, method: str, tol: float, max_iter: int
) -> Inversion:
    """Find the zero of field(y) - x, a gradient of a convex function, for each sample.

    Samples that have converged leave the batch.
    """
    shape = x.shape
    target = x.detach().flatten(1)

    def gradient(points: Tensor, rows: Tensor) -> Tensor:
        return field(points.reshape(-1, *shape[1:])).flatten(1) - target[rows]

    y = start.detach().flatten(1).clone()
    scale = target.norm(dim=1)
    rounding = torch.finfo(x.dtype).eps * target.shape[1] ** 0.5
    scale = torch.where(scale > rounding, scale, torch.ones_like(scale))
    rows = torch.arange(len(y), device=y.device)
    residual = torch.zeros_like(scale)
    g = gradient(y, rows)
    residual[rows] = g.norm(dim=1) / scale
    state: dict[str, list[Tensor]] = {"s": [], "q": [], "d": [], "step": []}
    n_iter = 0
    while n_iter < max_iter:
        active = residual[rows] > tol
        if not bool(active.all()):
            rows, g = rows[active], g[active]
            state = {name: [entry[active] for entry in entries] for name, entries in state.items()}
        if len(rows) == 0:
            break
        d = _lbfgs_direction(g, state) if method == "lbfgs" else _cg_direction(g, state)
        slope = _dot(g, d)
        # A direction that does not descend (rounding): steepest descent instead.
        bad = ~(slope < 0)
        d = torch.where(bad[:, None], -g, d)
        slope = torch.where(bad, -_dot(g, g), slope)
        first = state["step"][0] if method == "cg" and state["step"] else torch.ones_like(slope)
        # Quasi-Newton steps need little accuracy; conjugate directions nearly the minimum.
        shrink = (0.9, 0.5) if method == "lbfgs" else (0.1, 0.1)
        step, g_new = _line_search(gradient, y[rows], rows, d, slope, first, shrink)
        move = step[:, None] * d
        y[rows] += move
        state["s"], state["q"] = [*state["s"], move], [*state["q"], g_new - g]
        if len(state["s"]) > 10:
            del state["s"][0], state["q"][0]
        state["d"], state["step"] = [d], [step]
        g = g_new
        residual[rows] = g.norm(dim=1) / scale[rows]
        n_iter += 1
        stuck = move.abs().amax(1) <= torch.finfo(y.dtype).eps * y[rows].abs().amax(1)
        if bool(stuck.all()):
            break
    converged = residual <= tol
    if not bool(converged.all()):
        warnings.warn(
            f"inversion did not converge for {int((~converged).sum())} of {len(y)} samples after "
            f"{n_iter} iterations: worst relative residual {float(residual.max()):.2e}, tol {tol}."
            " Such x may lie outside the range of the network",
            RuntimeWarning,
            stacklevel=4,
        )
    return Inversion(y.reshape(shape), residual, converged, n_iter)


def _lbfgs_direction(g: Tensor, state: dict[str, list[Tensor]]) -> Tensor:
    """Apply the two-loop recursion, sample by sample, to -g."""
    tiny = torch.finfo(g.dtype).tiny
    direction = -g
    pairs = list(zip(state["s"], state["q"], strict=True))
    coefficients = []
    for s, q in reversed(pairs):
        curvature = _dot(s, q)
        # Curvature is positive in exact arithmetic; a pair lost to rounding is skipped.
        inverse = torch.where(curvature > tiny, 1 / curvature, torch.zeros_like(curvature))
        a = inverse * _dot(s, direction)
        direction = direction - a[:, None] * q
        coefficients.append((a, inverse))
    if pairs:
        s, q = pairs[-1]
        ratio = _dot(s, q) / _dot(q, q).clamp(min=tiny)
        direction = torch.where(ratio > 0, ratio, torch.ones_like(ratio))[:, None] * direction
    for (s, q), (a, inverse) in zip(pairs, reversed(coefficients), strict=True):
        direction = direction + (a - inverse * _dot(q, direction))[:, None] * s
    return direction


def _cg_direction(g: Tensor, state: dict[str, list[Tensor]]) -> Tensor:
    """Polak-Ribiere direction, which falls back to -g where its coefficient is negative."""
    if not state["d"]:
        return -g
    change = state["q"][-1]
    last = g - change
    beta = (_dot(g, change) / _dot(last, last).clamp(min=torch.finfo(g.dtype).tiny)).clamp(min=0)
    return -g + beta[:, None] * state["d"][0]


def _line_search(
    gradient: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    rows: Tensor,
    d: Tensor,
    slope: Tensor,
    first: Tensor,
    shrink: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Step lengths at which the slope along `d` has shrunk, and the gradients there.

    The new slope lies between ``shrink[0]`` times the old, negative one and ``-shrink[1]``
    times it.

    Along a line the derivative of a convex function increases, so its zero is bracketed from
    derivatives alone: no function values, whose differences rounding would swallow.
    """
    low, low_slope = torch.zeros_like(slope), slope.clone()
    high, high_slope = torch.full_like(slope, torch.inf), torch.zeros_like(slope)
    step = first.clone()
    result = torch.empty_like(y)
    lower, upper = shrink[0] * slope, -shrink[1] * slope
    open_ = torch.arange(len(y), device=y.device)
    for _ in range(25):
        t = step[open_]
        result[open_] = gradient(y[open_] + t[:, None] * d[open_], rows[open_])
        now = _dot(result[open_], d[open_])
        short, long = now < lower[open_], now > upper[open_]
        low[open_[short]], low_slope[open_[short]] = t[short], now[short]
        high[open_[long]], high_slope[open_[long]] = t[long], now[long]
        open_ = open_[short | long]
        if len(open_) == 0:
            break
        a, b = low[open_], high[open_]
        h_a, h_b = low_slope[open_], high_slope[open_]
        # Secant between the brackets, or beyond the lower one from the slope at zero.
        inside = a + (b - a) * (h_a / (h_a - h_b)).clamp(0.1, 0.9)
        start = slope[open_]
        beyond = a * (start / (start - h_a).clamp(max=-torch.finfo(y.dtype).tiny)).clamp(1.5, 10.0)
        step[open_] = torch.where(torch.isinf(b), beyond, inside)
    return step, result
