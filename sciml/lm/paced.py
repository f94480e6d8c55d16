"""Distil where the student sometimes succeeds: weights from its pass rate on every problem.

A problem that the student always solves has little to teach, and one that it never solves pulls
its gradient in directions that do not agree. PACED weighs problem x by ``p^alpha (1 - p)^beta``,
with p the share of the student's own responses that a checker accepts. It works with any
divergence; the best published schedule is forward KL first and reverse KL after.

References
----------
.. [1] Xu, Sang, Zhou, He and Wang, "PACED: Distillation (and On-Policy Self-Distillation) at the
   Frontier of Student Competence", arXiv:2603.11178, 2026.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sciml._check import (
    check_choice,
    check_finite,
    check_integer,
    check_interval,
    check_same_length,
    check_shape,
)

from .answer_checkers import exact_match
from .distillation import Distiller
from .divergences import Teacher, token_kl
from .vocabulary_rows import HiddenLogits, Logits

__all__ = [
    "GradientSNR",
    "PassRateEstimator",
    "PassRateWeighting",
    "TwoStageKL",
    "beta_kernel_weights",
    "gradient_snr",
    "hard_filter_weights",
    "paced_loss",
    "plot_gradient_snr",
    "weighting_efficiency",
]

Array = TypeVar("Array", np.ndarray, Tensor)
Checker = Callable[[Any, Any], bool]


def beta_kernel_weights(
    pass_rate: Array, alpha: float = 1.0, beta: float = 1.0, normalize: str | None = "mean"
) -> Array:
    """Weights ``p^alpha (1 - p)^beta`` of problems with pass rates p.

    Problems that are always or never solved get 0. The mode is at ``alpha / (alpha + beta)``.

    Parameters
    ----------
    pass_rate : ndarray or Tensor of shape (n_problems,)
        In [0, 1].
    alpha, beta : float, default=1.0
        Not negative (paper: 1). ``0 ** 0`` is 1, so that both 0 weighs all alike.
    normalize : {"mean", "max"} or None, default="mean"
        "mean" scales to a mean of 1 over the problems, which keeps the meaning of a learning
        rate (the paper does not say how it normalises); "max" makes the mode's weight 1; None is
        the kernel itself. Weights that are all 0 stay 0.

    Returns
    -------
    ndarray or Tensor of shape (n_problems,)
        Of the type that came.

    Raises
    ------
    TypeError, ValueError
        If a rate is NaN or outside [0, 1], or an exponent negative.

    Notes
    -----
    With rates of K trials, ``E[p (1 - p)]`` is ``1 - 1 / K`` times its value at the true rate: a
    constant, which normalising removes.

    References
    ----------
    .. [1] Xu et al., arXiv:2603.11178, 2026.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.lm import beta_kernel_weights
    >>> beta_kernel_weights(np.array([0.0, 0.25, 0.5, 1.0]))
    array([0.        , 1.71428571, 2.28571429, 0.        ])
    >>> beta_kernel_weights(np.array([0.0, 0.25, 0.5, 1.0]), normalize=None)
    array([0.    , 0.1875, 0.25  , 0.    ])
    """
    rates = _rates(pass_rate)
    check_interval("alpha", alpha, 0, math.inf, closed="left")
    check_interval("beta", beta, 0, math.inf, closed="left")
    check_choice("normalize", normalize, ("mean", "max", None))
    weights = rates**alpha * (1 - rates) ** beta
    if normalize == "max":
        mode = alpha / (alpha + beta) if alpha + beta > 0 else 0.5
        weights = weights / (mode**alpha * (1 - mode) ** beta)
    return _like(_mean_one(weights) if normalize == "mean" else weights, pass_rate)


def hard_filter_weights(
    pass_rate: Array, low: float = 0.2, high: float = 0.8, normalize: str | None = "mean"
) -> Array:
    """Weight 1 where ``low <= pass rate <= high`` and 0 elsewhere, the baseline of PACED.

    Parameters
    ----------
    pass_rate : ndarray or Tensor of shape (n_problems,)
    low, high : float, default=0.2, 0.8
        The paper does not give its thresholds; these are ours.
    normalize : {"mean"} or None, default="mean"
        "mean" scales to a mean of 1 over the problems.

    Returns
    -------
    ndarray or Tensor of shape (n_problems,)

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.lm import hard_filter_weights
    >>> hard_filter_weights(np.array([0.0, 0.25, 0.5, 1.0]))
    array([0., 2., 2., 0.])
    """
    rates = _rates(pass_rate)
    check_interval("low", low, 0, 1)
    check_interval("high", high, low, 1)
    check_choice("normalize", normalize, ("mean", None))
    weights = ((rates >= low) & (rates <= high)).astype(np.float64)
    return _like(_mean_one(weights) if normalize == "mean" else weights, pass_rate)


class PassRateEstimator:
    """Share of accepted responses on each of a pool of problems.

    Parameters
    ----------
    n_problems : int
    prior : (float, float), default=(0, 0)
        Accepted and refused responses to start from: the mean of a Beta posterior. (0, 0), plain
        shares, is the paper's.
    decay : float in [0, 1], default=0.0
        What remains of a problem's earlier counts when it is updated. 0 keeps the newest
        rollouts only, as the paper; 1 keeps all.

    Attributes
    ----------
    successes, trials : ndarray of shape (n_problems,)
        Counts, after decay.

    Examples
    --------
    >>> from sciml.lm import PassRateEstimator
    >>> estimator = PassRateEstimator(3)
    >>> estimator.update([0, 1], successes=[6, 0], trials=8)
    >>> estimator.pass_rate()
    array([0.75, 0.  ,  nan])
    >>> estimator.weights(unseen="uniform")
    array([2., 0., 1.])
    """

    def __init__(
        self, n_problems: int, *, prior: tuple[float, float] = (0.0, 0.0), decay: float = 0.0
    ) -> None:
        check_integer("n_problems", n_problems, 1)
        for value in prior:
            check_interval("prior", value, 0, math.inf, closed="left")
        check_interval("decay", decay, 0, 1)
        self.n_problems = n_problems
        self.prior = prior
        self.decay = decay
        self.successes = np.zeros(n_problems)
        self.trials = np.zeros(n_problems)

    def update(self, index: Sequence[int] | np.ndarray, successes: Any, trials: Any) -> None:
        """Count responses of some problems, each named at most once.

        Raises
        ------
        ValueError
            If a problem is named twice or does not exist, or successes exceed trials.
        """
        index = np.asarray(index)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise ValueError(f"index must be a sequence of integers, got {index!r}")
        if index.size and not (0 <= index.min() and index.max() < self.n_problems):
            raise ValueError(f"index must be in [0, {self.n_problems}), got {index}")
        if len(np.unique(index)) != len(index):
            raise ValueError(f"index must name a problem once, got {index}")
        successes = np.broadcast_to(np.asarray(successes, dtype=np.float64), index.shape)
        trials = np.broadcast_to(np.asarray(trials, dtype=np.float64), index.shape)
        if not ((successes >= 0) & (successes <= trials) & np.isfinite(trials)).all():
            raise ValueError(
                f"successes must be in [0, trials], got {successes} of trials {trials}"
            )
        self.successes[index] = self.decay * self.successes[index] + successes
        self.trials[index] = self.decay * self.trials[index] + trials

    def pass_rate(self) -> np.ndarray:
        """Pass rates of shape (n_problems,); NaN for problems without a trial or prior."""
        accepted, refused = self.prior
        total = self.trials + accepted + refused
        rates = np.full(self.n_problems, np.nan)
        np.divide(self.successes + accepted, total, out=rates, where=total > 0)
        return rates

    def weights(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        normalize: str | None = "mean",
        unseen: str = "error",
    ) -> np.ndarray:
        """Weights of the Beta kernel, with an explicit choice for problems never tried.

        Parameters
        ----------
        alpha, beta, normalize
            As in `beta_kernel_weights`.
        unseen : {"error", "skip", "uniform"}, default="error"
            Problems without a pass rate raise, get weight 0, or the mean weight of the others.

        Returns
        -------
        ndarray of shape (n_problems,)
        """
        check_choice("unseen", unseen, ("error", "skip", "uniform"))
        rates = self.pass_rate()
        missing = np.isnan(rates)
        if not missing.any():
            return beta_kernel_weights(rates, alpha, beta, normalize)
        if unseen == "error":
            raise ValueError(
                f"{int(missing.sum())} problems have no trial: choose unseen='skip' or 'uniform'"
            )
        kernel = np.zeros(self.n_problems)
        kernel[~missing] = beta_kernel_weights(
            rates[~missing], alpha, beta, None if normalize == "mean" else normalize
        )
        if unseen == "uniform":
            kernel[missing] = kernel[~missing].mean() if (~missing).any() else 1.0
        return _mean_one(kernel) if normalize == "mean" else kernel


class TwoStageKL:
    """One objective before a step and another from it on, for ``Distiller(objective=...)``.

    The paper's best schedule is forward KL, which brings the student to all that the teacher
    does, and then reverse KL, which makes it choose; pass rates are estimated anew at the switch
    (``PassRateWeighting(refresh_at=(switch_step,))``). It does not give the length of the stages.

    Parameters
    ----------
    switch_step : int
        First step of the second stage.
    first, second : str or callable, default="forward_kl", "reverse_kl"
        As ``Distiller`` takes them.

    Examples
    --------
    >>> from sciml.lm import TwoStageKL
    >>> schedule = TwoStageKL(100)
    >>> schedule.at(99), schedule.at(100)
    ('forward_kl', 'reverse_kl')
    """

    def __init__(
        self, switch_step: int, first: Any = "forward_kl", second: Any = "reverse_kl"
    ) -> None:
        check_integer("switch_step", switch_step, 0)
        self.switch_step = switch_step
        self.first = first
        self.second = second

    def at(self, step: int) -> Any:
        """The objective in force at a step."""
        return self.first if step < self.switch_step else self.second


class PassRateWeighting:
    """Weights of a distiller's prompts from the pass rates of its student.

    Before the first step, and again every `refresh_every` steps and at `refresh_at`, the student
    answers each prompt `n_rollouts` times, a checker judges the answers, and the weights follow.
    Between them the rates are stale, which costs little: weights off by a factor of ``1 +- d``
    lose at most ``d ** 2`` of the efficiency (`weighting_efficiency`).

    Parameters
    ----------
    answers : sequence
        Reference answer of each prompt of ``fit``.
    checker : callable, default=exact_match
        ``checker(response, answer) -> bool``. Responses are strings if the distiller has a
        tokenizer, else LongTensors.
    n_rollouts : int, default=8
        Responses a prompt (paper: 8).
    weight : callable, default=beta_kernel_weights
        ``weight(pass_rate) -> weights``, such as ``partial(beta_kernel_weights, beta=2.0)`` or
        `hard_filter_weights`.
    refresh_every : int or None, default=None
        The paper keeps pass rates "for several steps"; None keeps the first.
    refresh_at : sequence of int, default=()
        Further steps before which to refresh, such as the switch of `TwoStageKL`.
    batch_size : int, default=32
        Responses generated at a time.

    Attributes
    ----------
    pass_rate_ : ndarray of shape (n_prompts,)
        Of the last refresh.
    history_ : list of dict
        For each refresh "step", "pass_rate" (mean), "unsolved" and "mastered" (shares of prompts
        at 0 and at 1) and "generated_tokens".

    Examples
    --------
    >>> from sciml.lm import Distiller, PassRateWeighting, byte_language_model
    >>> teacher = byte_language_model(hidden_size=32, random_state=0)
    >>> student = byte_language_model(hidden_size=16, num_layers=1, random_state=1)
    >>> weighting = PassRateWeighting([0, 1], lambda response, answer: response[0] % 2 == answer)
    >>> distiller = Distiller(
    ...     student, teacher, max_new_tokens=2, average="sequence", weighting=weighting,
    ...     random_state=0,
    ... ).fit([[104, 105], [72]], n_steps=1, batch_size=2)
    >>> weighting.pass_rate_.shape
    (2,)
    """

    def __init__(
        self,
        answers: Sequence[Any],
        checker: Checker = exact_match,
        *,
        n_rollouts: int = 8,
        weight: Callable[[np.ndarray], np.ndarray] = beta_kernel_weights,
        refresh_every: int | None = None,
        refresh_at: Sequence[int] = (),
        batch_size: int = 32,
    ) -> None:
        check_integer("n_rollouts", n_rollouts, 1)
        check_integer("batch_size", batch_size, 1)
        if refresh_every is not None:
            check_integer("refresh_every", refresh_every, 1)
        for step in refresh_at:
            check_integer("refresh_at", step, 0)
        self.answers = answers
        self.checker = checker
        self.n_rollouts = n_rollouts
        self.weight = weight
        self.refresh_every = refresh_every
        self.refresh_at = refresh_at
        self.batch_size = batch_size
        self.history_: list[dict[str, Any]] = []
        self._refreshed_at: int | None = None

    def weights(self, distiller: Distiller, step: int) -> np.ndarray:
        """Weights for a step, after a refresh where one is due."""
        check_same_length(answers=self.answers, prompts=distiller.prompt_ids_)
        due = self.refresh_every is not None and step % self.refresh_every == 0
        if self._refreshed_at is None or (
            self._refreshed_at != step and (due or step in self.refresh_at)
        ):
            self.refresh(distiller, step)
        weights = np.asarray(self.weight(self.pass_rate_), dtype=np.float64)
        check_shape("weights", weights, self.pass_rate_.shape)
        check_finite("weights", weights)
        if (weights < 0).any():
            raise ValueError(f"weight must give weights that are 0 or larger, got {weights.min()}")
        return weights

    def refresh(self, distiller: Distiller, step: int) -> None:
        """Let the student answer every prompt `n_rollouts` times and judge the answers."""
        n = len(distiller.prompt_ids_)
        tasks = np.repeat(np.arange(n), self.n_rollouts)
        rank, n_processes = distiller.rank
        successes, n_tokens = np.zeros(n), 0
        for start in range(rank * self.batch_size, len(tasks), n_processes * self.batch_size):
            index = tasks[start : start + self.batch_size]
            responses = distiller.generate(
                distiller.student,
                [distiller.prompt_ids_[i] for i in index],
                max_new_tokens=distiller.cap,
                seed=distiller.seed_of("pass rate", step, start),
            )
            n_tokens += sum(len(response) for response in responses)
            for i, response in zip(index, distiller.decode(responses), strict=True):
                successes[i] += bool(self.checker(response, self.answers[i]))
        successes = distiller.sum_over_processes(successes)
        n_tokens = int(distiller.sum_over_processes(np.array(float(n_tokens))))
        distiller.n_generated_tokens_ += n_tokens
        self.pass_rate_ = successes / self.n_rollouts
        self._refreshed_at = step
        self.history_.append(
            {
                "step": step,
                "pass_rate": float(self.pass_rate_.mean()),
                "unsolved": float((self.pass_rate_ == 0).mean()),
                "mastered": float((self.pass_rate_ == 1).mean()),
                "generated_tokens": n_tokens,
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, serialisable as JSON."""
        return {
            "pass_rate": self.pass_rate_.tolist() if self._refreshed_at is not None else None,
            "refreshed_at": self._refreshed_at,
            "history": [dict(entry) for entry in self.history_],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the pass rates of a state."""
        if state["pass_rate"] is not None:
            check_same_length(answers=self.answers, pass_rate=state["pass_rate"])
            self.pass_rate_ = np.array(state["pass_rate"])
        self._refreshed_at = state["refreshed_at"]
        self.history_ = [dict(entry) for entry in state["history"]]


def paced_loss(
    student_logits: Logits,
    teacher_logits: Teacher,
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    divergence: Callable[..., Tensor] = token_kl,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Mean over problems of a weight times the mean divergence over the problem's tokens.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor of shape (batch, length, V) or HiddenLogits
        The teacher's may also be `TopKLogProbs`.
    weights : Tensor of shape (batch,)
        Of the problems, for example by `beta_kernel_weights` over the whole pool; constants.
    mask : BoolTensor of shape (batch, length), default=None
        Response tokens; None takes all. A problem without one contributes 0.
    divergence : callable, default=token_kl
        `token_kl`, `mixed_kl`, `adaptive_kl`, `generalized_jsd`, or a ``partial`` of them.
    temperature : float, default=1.0
    reduction : {"mean", "weighted", "sum"}, default="mean"
        Sum of ``weight * loss`` over problems, divided by their number, by the sum of their
        weights, or not. Weights that are all 0 give 0 with a gradient of 0.

    Returns
    -------
    Tensor
        Scalar.

    Raises
    ------
    TypeError, ValueError
        If shapes differ, or weights are negative or not finite.

    References
    ----------
    .. [1] Xu et al., arXiv:2603.11178, 2026.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import paced_loss, token_kl
    >>> student, teacher = torch.zeros(2, 1, 2), torch.tensor([0.9, 0.1]).log().expand(2, 1, 2)
    >>> loss = paced_loss(student, teacher, torch.tensor([2.0, 0.0]))
    >>> torch.equal(loss, token_kl(student, teacher))
    True
    """
    check_choice("reduction", reduction, ("mean", "weighted", "sum"))
    first = student_logits.hidden if isinstance(student_logits, HiddenLogits) else student_logits
    if first.dim() != 3:
        raise ValueError(
            f"student_logits must be of shape (batch, length, ...), got {tuple(first.shape)}"
        )
    shape = first.shape[:2]
    if weights.shape != shape[:1]:
        raise ValueError(f"weights must have shape ({shape[0]},), got {tuple(weights.shape)}")
    weights = weights.detach().to(first.device, torch.promote_types(weights.dtype, torch.float32))
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("weights must be 0 or larger and finite")
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=first.device)
    elif mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be a bool tensor of shape {tuple(shape)}, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    share = weights[:, None] * mask / mask.sum(1, keepdim=True).clamp(min=1)
    total = divergence(
        student_logits, teacher_logits, mask=share, temperature=temperature, reduction="sum"
    )
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / max(shape[0], 1)
    divisor = weights.sum()
    return total / torch.where(divisor > 0, divisor, torch.ones_like(divisor))


class GradientSNR(NamedTuple):
    """Signal-to-noise ratio of problems' gradients by pass rate.

    Attributes
    ----------
    pass_rate, snr : ndarray of shape (n_groups,)
    n_problems : ndarray of int of shape (n_groups,)
    """

    pass_rate: np.ndarray
    snr: np.ndarray
    n_problems: np.ndarray


def gradient_snr(gradients: Any, pass_rate: Any, n_bins: int | None = None) -> GradientSNR:
    """``||E g||^2 / tr Cov(g)`` over the problems of each pass rate.

    The squared norm of a group's mean gradient is too large by ``tr Cov / n`` on average; that is
    subtracted, so that a ratio may come out slightly negative where there is no signal.

    Parameters
    ----------
    gradients : array-like of shape (n_problems, n_parameters)
        Gradient of each problem's loss.
    pass_rate : array-like of shape (n_problems,)
    n_bins : int or None, default=None
        Number of equal bins of [0, 1]; None groups equal rates.

    Returns
    -------
    GradientSNR
        Groups of two problems or more, in increasing order of their (mean) pass rate.

    Examples
    --------
    >>> import numpy as np
    >>> from sciml.lm import gradient_snr
    >>> g = np.array([[1.0, 0.5], [1.0, -0.5], [0.0, 1.0], [0.0, -1.0]])
    >>> gradient_snr(g, [0.5, 0.5, 1.0, 1.0]).snr
    array([ 1.5, -0.5])
    """
    gradients = np.asarray(gradients, dtype=np.float64)
    check_shape("gradients", gradients, (None, None))
    check_finite("gradients", gradients)
    rates = _rates(np.asarray(pass_rate, dtype=np.float64))
    check_same_length(gradients=gradients, pass_rate=rates)
    if n_bins is None:
        _, group = np.unique(rates, return_inverse=True)
    else:
        check_integer("n_bins", n_bins, 1)
        group = np.minimum((rates * n_bins).astype(int), n_bins - 1)
    rows = []
    for value in np.unique(group):
        chosen = group == value
        count = int(chosen.sum())
        if count < 2:
            continue
        some = gradients[chosen]
        noise = float(some.var(axis=0, ddof=1).sum())
        signal = float(np.square(some.mean(axis=0)).sum()) - noise / count
        rows.append((rates[chosen].mean(), signal / noise if noise > 0 else np.inf, count))
    centers, snr, counts = (
        (np.array(column) for column in zip(*rows, strict=True))
        if rows
        else (
            np.empty(0),
            np.empty(0),
            np.empty(0, dtype=int),
        )
    )
    return GradientSNR(centers, snr, counts)


def plot_gradient_snr(
    result: GradientSNR, *, alpha: float = 1.0, beta: float = 1.0, ax: Any = None
) -> Any:
    """Plot signal-to-noise ratios over the pass rate, with the Beta kernel scaled to them.

    Parameters
    ----------
    result : GradientSNR
    alpha, beta : float, default=1.0
        Of the kernel drawn beside.
    ax : matplotlib.axes.Axes or None, default=None
        None makes a figure.

    Returns
    -------
    matplotlib.axes.Axes
    """
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    grid = np.linspace(0, 1, 201)
    kernel = beta_kernel_weights(grid, alpha, beta, normalize=None)
    at_rates = beta_kernel_weights(result.pass_rate, alpha, beta, normalize=None)
    # Least squares through the origin: only the shape is compared.
    scale = float(result.snr @ at_rates / max(float(at_rates @ at_rates), 1e-300))
    ax.plot(result.pass_rate, result.snr, "o-", label="gradient SNR")
    ax.plot(grid, scale * kernel, "--", label=f"{scale:.2g} p^{alpha:g} (1 - p)^{beta:g}")
    ax.set(xlabel="pass rate p", ylabel="||E g||² / tr Cov(g)")
    ax.legend()
    return ax


def weighting_efficiency(weights: Any, signal: Any, noise: Any) -> float:
    """Signal-to-noise ratio of a weighted gradient, relative to the best weights.

    ``(sum w mu)^2 / (sum w^2 sigma^2)`` for independent problems with mean gradient mu along a
    common direction and variance sigma^2, divided by its maximum, which ``w = mu / sigma^2``
    attains. If weights are the best ones times factors in ``[1 - d, 1 + d]``, it is at least
    ``1 - d^2``: the squared, not the plain, error of the weights is what is lost.

    Parameters
    ----------
    weights, signal, noise : array-like of shape (n_problems,)
        w, mu and sigma^2 > 0.

    Returns
    -------
    float in [0, 1]

    Raises
    ------
    ValueError
        If shapes differ, a variance is not positive, or weights or signal are all 0.

    Examples
    --------
    >>> from sciml.lm import weighting_efficiency
    >>> weighting_efficiency([1.0, 3.0], [1.0, 1.0], [1.0, 1.0])
    0.8
    """
    w, mu, variance = (np.asarray(a, dtype=np.float64) for a in (weights, signal, noise))
    for name, array in (("weights", w), ("signal", mu), ("noise", variance)):
        check_shape(name, array, (None,))
        check_finite(name, array)
    check_same_length(weights=w, signal=mu, noise=variance)
    if not (variance > 0).all():
        raise ValueError(f"noise must be positive, got {variance.min()}")
    if not w.any() or not mu.any():
        raise ValueError("weights and signal must not be all 0")
    best = float(np.square(mu) @ (1 / variance))
    return float((w @ mu) ** 2 / (np.square(w) @ variance) / best)


def _rates(pass_rate: Any) -> np.ndarray:
    """Pass rates in float64, checked."""
    rates = pass_rate.detach().cpu().numpy() if isinstance(pass_rate, Tensor) else pass_rate
    rates = np.asarray(rates, dtype=np.float64)
    check_shape("pass_rate", rates, (None,))
    bad = ~((rates >= 0) & (rates <= 1))
    if bad.any():
        raise ValueError(f"pass_rate must be in [0, 1], got {rates[bad][0]}")
    return rates


def _like(weights: np.ndarray, pass_rate: Any) -> Any:
    if not isinstance(pass_rate, Tensor):
        return weights
    dtype = pass_rate.dtype if pass_rate.is_floating_point() else torch.get_default_dtype()
    return torch.as_tensor(weights, dtype=dtype, device=pass_rate.device)


def _mean_one(weights: np.ndarray) -> np.ndarray:
    mean = weights.mean() if len(weights) else 0.0
    return weights / mean if mean > 0 else weights
