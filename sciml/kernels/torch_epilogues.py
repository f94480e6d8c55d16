"""Scalar epilogues of `sciml.kernels.pairwise` for torch tensors, differentiable.

Each function maps inner products ``S[i, j] = <x_i, y_j>`` and squared norms to kernel values by
out-of-place operations. Where the chain rule meets 0 times infinity (square roots at 0, arccos
at 1) the gradients are the analytic ones, which are finite; at a true kink, such as
``exp(-||x - y||)`` or the NTK at ``x = y``, the symmetric subgradient 0 is used.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["EPILOGUES", "apply_epilogue", "laplacian", "laplacian_into", "mirror"]


def polynomial(
    S: Tensor, qx: Tensor, qy: Tensor, gamma: float, coef0: float, degree: int
) -> Tensor:
    """Return (gamma S + coef0)^degree."""
    return (gamma * S + coef0) ** degree


def rbf(S: Tensor, qx: Tensor, qy: Tensor, gamma: float) -> Tensor:
    """Return exp(-gamma ||x - y||^2)."""
    return (-gamma * _squared_distance(S, qx, qy)).exp()


def exponential(S: Tensor, qx: Tensor, qy: Tensor, gamma: float) -> Tensor:
    """Return exp(-gamma ||x - y||)."""
    return (-gamma * _safe_sqrt(_squared_distance(S, qx, qy))).exp()


def arc_cosine(S: Tensor, qx: Tensor, qy: Tensor, order: int) -> Tensor:
    """Return the arc-cosine kernel of order 0 or 1."""
    c = _safe_sqrt(qx)[:, None] * _safe_sqrt(qy)
    moment: Any = ReLUMoment if order == 1 else StepMoment
    return 2 * moment.apply(S, c)


def network(
    S: Tensor,
    qx: Tensor,
    qy: Tensor,
    scale: float,
    w2: float,
    b2: float,
    depth: int,
    tangent: bool,
) -> Tensor:
    """Return the NTK (`tangent`) or NNGP of a ReLU network with `depth` hidden layers."""
    S, qx, qy = scale * S + b2, scale * qx + b2, scale * qy + b2
    T = S
    for _ in range(depth):
        c = _safe_sqrt(qx)[:, None] * _safe_sqrt(qy)
        previous, S = S, w2 * ReLUMoment.apply(S, c) + b2
        if tangent:
            T = S + w2 * StepMoment.apply(previous, c) * T
        qx, qy = 0.5 * w2 * qx + b2, 0.5 * w2 * qy + b2
    return T if tangent else S


def laplacian(X: Tensor, Y: Tensor, gamma: float) -> Tensor:
    """Return exp(-gamma ||x - y||_1); the L1 distance has no inner product in it."""
    return (-gamma * torch.cdist(X, Y, p=1)).exp()


EPILOGUES: dict[str, Callable[..., Tensor]] = {
    "polynomial": polynomial,
    "rbf": rbf,
    "exponential": exponential,
    "arc_cosine": arc_cosine,
    "network": network,
}


def apply_epilogue(name: str, S: Tensor, qx: Tensor, qy: Tensor, params: tuple[Any, ...]) -> None:
    """Overwrite the first ``len(qy)`` columns of S by kernel values."""
    tile = S[:, : len(qy)]
    tile.copy_(EPILOGUES[name](tile, qx, qy, *params))


def laplacian_into(out: Tensor, X: Tensor, Y: Tensor, gamma: float) -> None:
    """Write exp(-gamma ||x - y||_1) to the first ``len(Y)`` columns of `out`."""
    out[:, : len(Y)] = laplacian(X, Y, gamma)


def mirror(K: Tensor, rows: slice) -> None:
    """Copy these rows, left of and on the diagonal, to the columns above the diagonal."""
    start, stop = rows.start, rows.stop
    K[:start, start:stop] = K[start:stop, :start].T
    square = K[start:stop, start:stop]
    square.copy_(square.tril() + square.tril(-1).T)


class ReLUMoment(torch.autograd.Function):
    """E[relu(a) relu(b)] of a Gaussian pair with covariance S and norm product c.

    The value is ``(c sin(t) + S (pi - t)) / (2 pi)`` with ``cos(t) = S / c``; its derivatives
    ``(pi - t) / (2 pi)`` in S and ``sin(t) / (2 pi)`` in c are finite everywhere.
    """

    @staticmethod
    def forward(ctx: Any, S: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(S, c)
        u = _cosine(S, c)
        return (c * _sine(u) + c * u * (math.pi - u.arccos())) / (2 * math.pi)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        S, c = ctx.saved_tensors
        sine = _safe_sqrt((c - S) * (c + S)) / torch.where(c > 0, c, 1)
        return grads[0] * StepMoment.apply(S, c), grads[0] * sine / (2 * math.pi)


class StepMoment(torch.autograd.Function):
    """P[a > 0 and b > 0] of a Gaussian pair with covariance S and norm product c.

    The value is ``(pi - t) / (2 pi)`` with ``cos(t) = S / c``. It has a kink at t = 0 and t = pi,
    where the gradient is set to the symmetric subgradient 0.
    """

    @staticmethod
    def forward(ctx: Any, S: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(S, c)
        return (math.pi - _cosine(S, c).arccos()) / (2 * math.pi)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        S, c = ctx.saved_tensors
        product = (c - S) * (c + S)
        # Rounding of S moves `product` by a few eps c^2: below that the angle is not resolved.
        inside = product > 8 * torch.finfo(S.dtype).eps * c * c
        slope = torch.where(inside, 1 / torch.where(inside, product, 1).sqrt(), 0) / (2 * math.pi)
        ratio = S / torch.where(c > 0, c, 1)
        return grads[0] * slope, -grads[0] * slope * ratio


def _cosine(S: Tensor, c: Tensor) -> Tensor:
    """Return S / c in [-1, 1], and 0 where a vector is zero."""
    return (S / torch.where(c > 0, c, 1)).clamp(-1, 1)


def _sine(u: Tensor) -> Tensor:
    return ((1 - u) * (1 + u)).sqrt()


def _squared_distance(S: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
    return (qx[:, None] + qy - 2 * S).clamp(min=0)


def _safe_sqrt(x: Tensor) -> Tensor:
    """Return the square root of max(x, 0) with gradient 0 at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)
