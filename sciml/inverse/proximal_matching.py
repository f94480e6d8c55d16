"""Proximal matching: a loss whose minimiser is the MAP denoiser, not the posterior mean.

The loss 1 - exp(-||f(y) - x||^2 / gamma^2), averaged over clean x and noisy y = x + noise,
counts how seldom f(y) comes within gamma of x. As gamma goes to 0 its minimiser is
argmax_c p(x = c | y), the proximal operator of -sigma^2 log p, at almost every y; squared
error would give the posterior mean and absolute error the posterior median, neither of which
is the proximal operator of the prior. Training starts with absolute error and then lowers gamma.

References
----------
.. [1] Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse
   Problems", ICLR 2024, arXiv:2310.14344, Theorem 3.2.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._check import check_choice, check_integer, check_interval

__all__ = ["ProximalMatchingLoss", "ProximalMatchingSchedule", "proximal_matching_loss"]


def proximal_matching_loss(
    x_hat: Tensor,
    x: Tensor,
    gamma: float,
    reduction: str = "mean",
    reduction_within: str = "sum",
) -> Tensor:
    """Compute 1 - exp(-||x_hat - x||^2 / gamma^2), the proximal matching loss.

    Parameters
    ----------
    x_hat, x : Tensor of shape (batch, ...)
        Denoised and clean samples.
    gamma : float
        Width of the well, positive. Large values give ||x_hat - x||^2 / gamma^2.
    reduction : {"mean", "sum", "none"}, default="mean"
        Over the batch.
    reduction_within : {"sum", "mean"}, default="sum"
        Whether ||.||^2 sums the entries of a sample, as in the paper, or averages them, which
        makes `gamma` a root-mean-square error free of the image size.

    Returns
    -------
    Tensor of shape () or (batch,)
        The loss, between 0 and 1 a sample. The paper's constant factor of the exponential is
        left out, as in the published code: it does not move the minimiser.

    Raises
    ------
    ValueError
        If the shapes differ, `gamma` is not positive or a reduction is unknown.

    References
    ----------
    .. [1] Fang, Buchanan and Sulam, arXiv:2310.14344, equation (3.4).

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse import proximal_matching_loss
    >>> x = torch.zeros(2, 3)
    >>> proximal_matching_loss(x, x, gamma=0.5)
    tensor(0.)
    """
    check_interval("gamma", gamma, 0, closed="neither")
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_choice("reduction_within", reduction_within, ("sum", "mean"))
    if x_hat.shape != x.shape or x.dim() == 0:
        raise ValueError(
            "x_hat and x must have the same shape (batch, ...), "
            f"got {tuple(x_hat.shape)} and {tuple(x.shape)}"
        )
    squares = (x_hat - x).square().reshape(len(x), -1)
    distance = squares.sum(1) if reduction_within == "sum" else squares.mean(1)
    # expm1 keeps its digits where the distance is small against gamma.
    loss = -torch.expm1(-distance / gamma**2)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


class ProximalMatchingLoss(nn.Module):
    """Module form of `proximal_matching_loss`.

    Also serves as the metric of ``deepinv.loss.SupLoss`` with ``reduction="none"``.

    Parameters
    ----------
    gamma : float
        Width of the well, positive.
    reduction : {"mean", "sum", "none"}, default="mean"
        Over the batch.
    reduction_within : {"sum", "mean"}, default="sum"
        Over the entries of a sample.

    Examples
    --------
    >>> import torch
    >>> from sciml.inverse import ProximalMatchingLoss
    >>> ProximalMatchingLoss(gamma=1.0)(torch.ones(4, 1), torch.zeros(4, 1))
    tensor(0.6321)
    """

    def __init__(
        self, gamma: float, reduction: str = "mean", reduction_within: str = "sum"
    ) -> None:
        super().__init__()
        check_interval("gamma", gamma, 0, closed="neither")
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        check_choice("reduction_within", reduction_within, ("sum", "mean"))
        self.gamma = float(gamma)
        self.reduction = reduction
        self.reduction_within = reduction_within

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Compute the loss of denoised `x_hat` against clean `x`."""
        return proximal_matching_loss(x_hat, x, self.gamma, self.reduction, self.reduction_within)

    def extra_repr(self) -> str:
        """Describe the loss in `print`."""
        return f"gamma={self.gamma:g}"


class TrainingStage(NamedTuple):
    """A stretch of training with one loss and one learning rate.

    Parameters
    ----------
    loss : float or {"l1", "l2"}
        A number is the gamma of proximal matching; "l1" and "l2" are the mean absolute and
        mean squared error.
    n_steps : int
        Optimiser steps.
    learning_rate : float
        Step size of Adam.
    """

    loss: float | str
    n_steps: int
    learning_rate: float


class ProximalMatchingSchedule:
    """Which loss and learning rate each training step has: absolute error, then falling gamma.

    Parameters
    ----------
    n_features : int
        Entries of a sample, C * H * W.
    n_steps : int, default=40000
        All steps (paper: 40 000).
    n_warmup : int, default=None
        Steps with the absolute error. None is half of all (paper: 20 000).
    n_stages : int, default=4
        Equal stages, gamma halving from one to the next (paper: 4); the last takes what is
        left by the division.
    gamma_min : float, default=None
        gamma of the last stage. None is the published 0.08 sqrt(n_features).
    learning_rate : (float, float), default=(1e-3, 1e-4)
        In the warm-up and after it (paper: 1e-3 and 1e-4).

    Attributes
    ----------
    stages : tuple of TrainingStage
        The stages in order.

    References
    ----------
    .. [1] Fang, Buchanan and Sulam, arXiv:2310.14344, Appendix C.

    Examples
    --------
    >>> from sciml.inverse import ProximalMatchingSchedule
    >>> schedule = ProximalMatchingSchedule(n_features=28 * 28)
    >>> [round(stage.loss, 2) for stage in schedule.stages[1:]]
    [17.92, 8.96, 4.48, 2.24]
    """

    def __init__(
        self,
        n_features: int,
        n_steps: int = 40_000,
        n_warmup: int | None = None,
        n_stages: int = 4,
        gamma_min: float | None = None,
        learning_rate: tuple[float, float] = (1e-3, 1e-4),
    ) -> None:
        check_integer("n_features", n_features, 1)
        check_integer("n_steps", n_steps, 1)
        n_warmup = n_steps // 2 if n_warmup is None else n_warmup
        check_integer("n_warmup", n_warmup, 0, n_steps)
        check_integer("n_stages", n_stages, 1)
        gamma_min = 0.08 * n_features**0.5 if gamma_min is None else gamma_min
        check_interval("gamma_min", gamma_min, 0, closed="neither")
        length, rest = divmod(n_steps - n_warmup, n_stages)
        stages = [TrainingStage("l1", n_warmup, learning_rate[0])]
        for k in range(n_stages):
            gamma = float(gamma_min) * 2 ** (n_stages - 1 - k)
            last = k == n_stages - 1
            stages.append(TrainingStage(gamma, length + rest * last, learning_rate[1]))
        self.stages = _checked(stages)

    @classmethod
    def from_stages(
        cls, stages: Iterable[tuple[float | str, int, float]]
    ) -> "ProximalMatchingSchedule":
        """Make a schedule of any stages.

        Parameters
        ----------
        stages : iterable of (loss, n_steps, learning_rate)
            loss is "l1", "l2" or the gamma of proximal matching.

        Returns
        -------
        ProximalMatchingSchedule
            The schedule.

        Examples
        --------
        >>> from sciml.inverse import ProximalMatchingSchedule
        >>> ProximalMatchingSchedule.from_stages([("l1", 1000, 1e-3), (0.5, 500, 1e-3)]).n_steps
        1500
        """
        schedule = cls.__new__(cls)
        schedule.stages = _checked([TrainingStage(*stage) for stage in stages])
        return schedule

    @property
    def n_steps(self) -> int:
        """All steps."""
        return sum(stage.n_steps for stage in self.stages)

    def __call__(self, step: int) -> TrainingStage:
        """Return the stage that `step`, counted from 0, belongs to."""
        check_integer("step", step, 0, self.n_steps - 1)
        for stage in self.stages:
            if step < stage.n_steps:
                break
            step -= stage.n_steps
        return stage

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProximalMatchingSchedule) and self.stages == other.stages

    def __hash__(self) -> int:
        return hash(self.stages)

    def __repr__(self) -> str:
        return f"ProximalMatchingSchedule.from_stages({[tuple(s) for s in self.stages]})"


def _checked(stages: list[TrainingStage]) -> tuple[TrainingStage, ...]:
    """Drop empty stages and raise on a bad one."""
    for stage in stages:
        if isinstance(stage.loss, str):
            check_choice("loss", stage.loss, ("l1", "l2"))
        else:
            check_interval("gamma", stage.loss, 0, closed="neither")
        check_integer("n_steps", stage.n_steps, 0)
        check_interval("learning_rate", stage.learning_rate, 0, closed="neither")
    kept = tuple(
        TrainingStage(
            stage.loss if isinstance(stage.loss, str) else float(stage.loss),
            int(stage.n_steps),
            float(stage.learning_rate),
        )
        for stage in stages
        if stage.n_steps > 0
    )
    if not kept:
        raise ValueError("stages must hold at least one step, got none")
    return kept
