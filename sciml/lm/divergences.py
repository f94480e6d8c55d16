"""Divergences between the next-token distributions of a student and a teacher.

Forward and reverse Kullback-Leibler divergence, their mixture, the generalized Jensen-Shannon
divergence and estimates from the sampled token alone. All read logits or hidden states with the
head's weights, work on chunks of rows in float32 (float64 stays), and take their gradients in
closed form: with ``q = softmax(z)`` of the student and ``p`` of the teacher,

    dKL(p || q) / dz = q - p
    dKL(q || p) / dz = q (log q - log p - KL(q || p))
    dJSD / dz        = (1 - beta) q (log(q / m) - KL(q || m)),   m = beta p + (1 - beta) q

A teacher may also be its `top_k_log_probs`: the k most probable tokens and the mass of all others
as one more event.

References
----------
.. [1] Zhao et al., "Decoupling KL and Trajectories: A Unified Perspective for SFT, DAgger,
   Offline RL, and OPD in LLM Distillation", arXiv:2605.16826, 2026.
.. [2] Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
   Mistakes", ICLR 2024, arXiv:2306.13649, equation 1.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sciml._check import check_choice, check_integer, check_interval

from .token_reduction import Reduction, reduce_tokens, token_logps
from .vocabulary_rows import (
    HiddenLogits,
    Logits,
    RowReduction,
    reduce_rows,
    rowwise_dot,
    sum_rows,
    vocabulary_size,
)

__all__ = [
    "TopKLogProbs",
    "adaptive_kl",
    "generalized_jsd",
    "mixed_kl",
    "sampled_reverse_kl",
    "sampled_reverse_kl_from_logps",
    "token_kl",
    "top_k_log_probs",
]


class TopKLogProbs(NamedTuple):
    """A teacher's distribution cut to its k most probable tokens, and the mass of the rest.

    Divergences compare the student with it on ``k + 1`` events: each of the k tokens, and "any
    other token". By the data processing inequality this is at most the divergence on the whole
    vocabulary, and equal to it for k = V. Nothing says how the student's mass on the other tokens
    is to be shared among them, and the gradient leaves their proportions as they are. (Dropping
    the tail and renormalising, as is often done, would instead teach that it has mass 0.)

    Attributes
    ----------
    log_probs : Tensor of shape (..., k)
    indices : LongTensor of shape (..., k)
        Token ids of `log_probs`.
    log_tail : Tensor of shape (..., 1)
        Log of the mass of all other tokens; ``-inf`` if there are none.
    temperature : float
        Temperature of the softmax that `log_probs` came from.
    """

    log_probs: Tensor
    indices: Tensor
    log_tail: Tensor
    temperature: float = 1.0


Teacher = Logits | TopKLogProbs
EventDivergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def token_kl(
    student_logits: Logits,
    teacher_logits: Teacher,
    *,
    direction: str = "forward",
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of student and teacher at every token, over the vocabulary.

    Forward, ``KL(teacher || student)``, has the gradient of supervised fine-tuning on soft labels
    and spreads the student over all that the teacher does; reverse, ``KL(student || teacher)``,
    has the gradient of reinforcement learning with the reward ``log p - log q`` and draws the
    student to what the teacher does most.

    Parameters
    ----------
    student_logits : Tensor of shape (..., V) or HiddenLogits
        The rows are compared as they are: nothing is shifted.
    teacher_logits : Tensor of shape (..., V), HiddenLogits or TopKLogProbs
        The same leading shape and vocabulary. Its gradient is not taken.
    direction : {"forward", "reverse"}, default="forward"
    mask : Tensor of shape (...), default=None
        Which tokens count: bool, or weights that are 0 or larger. None counts all.
    temperature : float, default=1.0
        Both logits are divided by it. The loss is not multiplied by its square.
    reduction : {"mean", "sum", "none"}, default="mean"
        "mean" divides the sum by the sum of the mask; "none" gives one (weighted) value a token.
    num_items_in_batch : int, Tensor or None, default=None
        If given, "mean" divides by it instead, as gradient accumulation needs.
    chunk_size : int or None, default=None
        Rows at a time; None chooses.

    Returns
    -------
    Tensor
        Scalar, or of shape (...) for "none". A mask without tokens gives 0 with a graph.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or a token's divergence is not finite: a teacher of
        probability 0 where the student's is positive (reverse), a student of probability 0
        (forward), or NaN. Nothing is clamped.

    See Also
    --------
    mixed_kl, generalized_jsd, sampled_reverse_kl

    References
    ----------
    .. [1] Zhao et al., arXiv:2605.16826, 2026.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import token_kl
    >>> student = torch.zeros(1, 2, requires_grad=True)
    >>> teacher = torch.tensor([[0.9, 0.1]]).log()
    >>> loss = token_kl(student, teacher)
    >>> loss.backward()
    >>> round(loss.item(), 4), student.grad
    (0.3681, tensor([[-0.4000,  0.4000]]))
    """
    check_choice("direction", direction, ("forward", "reverse"))
    return mixed_kl(
        student_logits,
        teacher_logits,
        reverse_weight=1.0 if direction == "reverse" else 0.0,
        mask=mask,
        temperature=temperature,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        chunk_size=chunk_size,
    )


def mixed_kl(
    student_logits: Logits,
    teacher_logits: Teacher,
    *,
    reverse_weight: float = 0.2,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Weighted sum of reverse and forward Kullback-Leibler divergence at every token.

    ``reverse_weight KL(q || p) + (1 - reverse_weight) KL(p || q)`` for the student's q and the
    teacher's p. This is not the generalized Jensen-Shannon divergence, which compares both with
    their mixture.

    Parameters
    ----------
    student_logits, teacher_logits, mask, temperature, reduction, num_items_in_batch, chunk_size
        As in `token_kl`.
    reverse_weight : float in [0, 1], default=0.2
        The paper's finding: at long horizons 0.2 keeps about the accuracy of pure reverse KL,
        with a healthy entropy, and more lets the length of responses inflate.

    Returns
    -------
    Tensor
        Scalar, or of shape (...) for ``reduction="none"``.

    Raises
    ------
    TypeError, ValueError
        As in `token_kl`.

    References
    ----------
    .. [1] Zhao et al., arXiv:2605.16826, 2026.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import mixed_kl
    >>> teacher = torch.tensor([[0.9, 0.1]]).log()
    >>> round(mixed_kl(torch.zeros(1, 2), teacher, reverse_weight=0.2).item(), 4)
    0.3966
    """
    check_interval("reverse_weight", reverse_weight, 0, 1)
    return reduce_divergence(
        partial(_mixed_kl_events, reverse_weight=float(reverse_weight)),
        student_logits,
        teacher_logits,
        mask=mask,
        temperature=temperature,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        chunk_size=chunk_size,
    )


def generalized_jsd(
    student_logits: Logits,
    teacher_logits: Teacher,
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Generalized Jensen-Shannon divergence at every token, as in TRL's ``GKDTrainer``.

    ``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``; its ends are
    *defined* as ``KL(p || q)`` for beta = 0 and ``KL(q || p)`` for beta = 1, as in the paper's
    code and TRL, although the formula itself is 0 there.

    Parameters
    ----------
    student_logits, teacher_logits, mask, temperature, num_items_in_batch, chunk_size
        As in `token_kl`. TRL takes ``labels`` instead; ``mask=labels != -100`` is the same.
    beta : float in [0, 1], default=0.5
    reduction : {"batchmean", "mean", "sum", "none"}, default="batchmean"
        "batchmean" is TRL's: with a mask the mean over its tokens, without one the sum divided by
        the first dimension. "mean" is the mean over tokens in both cases. "none" gives one value
        a token, where TRL gives one a vocabulary entry.

    Returns
    -------
    Tensor
        Scalar, or of shape (...) for "none".

    Raises
    ------
    TypeError, ValueError
        As in `token_kl`.

    References
    ----------
    .. [1] Agarwal et al., arXiv:2306.13649, 2024, equation 1.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import generalized_jsd
    >>> teacher = torch.tensor([[0.9, 0.1]]).log()
    >>> round(generalized_jsd(torch.zeros(1, 2), teacher).item(), 4)
    0.1017
    """
    check_interval("beta", beta, 0, 1)
    check_choice("reduction", reduction, ("batchmean", "mean", "sum", "none"))
    events: EventDivergence = (
        partial(_mixed_kl_events, reverse_weight=float(beta))
        if beta in (0, 1)
        else partial(_jsd_events, beta=float(beta))
    )
    if reduction == "batchmean":
        reduction = "mean"
        if mask is None and num_items_in_batch is None:
            num_items_in_batch = max(_leading_shape(student_logits)[0], 1)
    return reduce_divergence(
        events,
        student_logits,
        teacher_logits,
        mask=mask,
        temperature=temperature,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        chunk_size=chunk_size,
    )


def adaptive_kl(
    student_logits: Logits,
    teacher_logits: Teacher,
    *,
    head_mass: float = 0.5,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Mixture of forward and reverse KL whose weights follow where student and teacher differ.

    Forward KL first fits the head of the teacher's distribution, reverse KL its tail. At every
    token the forward divergence gets the share of ``sum |p - q|`` that lies in the head, the most
    probable tokens of the teacher that together reach `head_mass`, and the reverse one the rest.
    The weights are held constant in the gradient.

    Parameters
    ----------
    student_logits, teacher_logits, mask, temperature, reduction, num_items_in_batch, chunk_size
        As in `token_kl`.
    head_mass : float in [0, 1], default=0.5
        As in the paper.

    Returns
    -------
    Tensor
        Scalar, or of shape (...) for ``reduction="none"``.

    References
    ----------
    .. [1] Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
       Language Models", arXiv:2404.02657, 2024.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import adaptive_kl
    >>> teacher = torch.tensor([[0.9, 0.1]]).log()
    >>> round(adaptive_kl(torch.zeros(1, 2), teacher).item(), 4)
    0.4394
    """
    check_interval("head_mass", head_mass, 0, 1)
    return reduce_divergence(
        partial(_adaptive_kl_events, head_mass=float(head_mass)),
        student_logits,
        teacher_logits,
        mask=mask,
        temperature=temperature,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        chunk_size=chunk_size,
    )


def sampled_reverse_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Tensor,
    *,
    estimator: str = "k1",
    shift: bool = True,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Estimate of the reverse KL from the tokens that the student drew, with its policy gradient.

    The value is the estimator's; the gradient is ``(log q - log p) d log q`` at the drawn token
    whatever the estimator, with the first factor held constant: REINFORCE with the dense reward
    ``log p - log q``, unbiased for the gradient of ``KL(q || p)`` at the prefix. Differentiating
    the estimators themselves would give that for k2 only; k1 would give 0 on average, and k3 the
    gradient of the *forward* KL.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor of shape (batch, length, V) or HiddenLogits
    labels : LongTensor of shape (batch, length)
        The tokens, drawn from the student; -100 where none counts.
    estimator : {"k1", "k2", "k3"}, default="k1"
        With ``r = p(y) / q(y)``: ``-log r`` (unbiased), ``(log r)^2 / 2`` (biased, less variance)
        or ``r - 1 - log r`` (unbiased, never negative).
    shift : bool, default=True
        Whether row t of the logits predicts label t + 1; False if row t predicts label t.
    temperature : float, default=1.0
        Both logits are divided by it; the tokens must have been drawn at this temperature.
    reduction, num_items_in_batch, chunk_size
        As in `token_kl`.

    Returns
    -------
    Tensor
        Scalar, or of shape (batch, length) for ``reduction="none"``.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or a log-probability at a label is not finite.

    References
    ----------
    .. [1] Zhao et al., arXiv:2605.16826, 2026, proposition on gradients.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import sampled_reverse_kl
    >>> student = torch.zeros(1, 1, 2, requires_grad=True)
    >>> teacher = torch.tensor([[[0.9, 0.1]]]).log()
    >>> loss = sampled_reverse_kl(student, teacher, torch.tensor([[0]]), shift=False)
    >>> loss.backward()
    >>> round(loss.item(), 4), student.grad
    (-0.5878, tensor([[[-0.2939,  0.2939]]]))
    """
    _check_vocabularies(student_logits, teacher_logits)
    student_logps, mask = token_logps(
        student_logits, labels, shift=shift, temperature=temperature, chunk_size=chunk_size
    )
    with torch.no_grad():
        teacher_logps, _ = token_logps(
            teacher_logits, labels, shift=shift, temperature=temperature, chunk_size=chunk_size
        )
    return sampled_reverse_kl_from_logps(
        student_logps,
        teacher_logps,
        mask,
        estimator=estimator,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
    )


def sampled_reverse_kl_from_logps(
    student_logps: Tensor,
    teacher_logps: Tensor,
    mask: Tensor | None = None,
    *,
    estimator: str = "k1",
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """`sampled_reverse_kl` from log-probabilities of the drawn tokens, for example of a server.

    Parameters
    ----------
    student_logps : Tensor of shape (batch, length)
        Log-probability of each drawn token under the student, with a graph.
    teacher_logps : Tensor of shape (batch, length)
    mask : BoolTensor of shape (batch, length), default=None
        Tokens that count; None counts all.
    estimator, reduction, num_items_in_batch
        As in `sampled_reverse_kl`.

    Returns
    -------
    Tensor
        Scalar, or of shape (batch, length) for ``reduction="none"``.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import sampled_reverse_kl_from_logps
    >>> student = torch.tensor([[0.5]]).log().requires_grad_()
    >>> loss = sampled_reverse_kl_from_logps(student, torch.tensor([[0.9]]).log(), estimator="k3")
    >>> round(loss.item(), 4)
    0.2122
    """
    check_choice("estimator", estimator, ("k1", "k2", "k3"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if student_logps.shape != teacher_logps.shape:
        raise ValueError(
            f"teacher_logps must have the shape of student_logps, {tuple(student_logps.shape)}, "
            f"got {tuple(teacher_logps.shape)}"
        )
    if mask is None:
        mask = torch.ones_like(student_logps, dtype=torch.bool)
    elif mask.shape != student_logps.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be a bool tensor of shape {tuple(student_logps.shape)}, got {mask.dtype} "
            f"of shape {tuple(mask.shape)}"
        )
    with torch.no_grad():
        # Where the mask is off anything may stand, NaN too.
        advantage = (student_logps - teacher_logps).masked_fill(~mask, 0)
        _check_values(advantage, mask, "log-probabilities of the drawn tokens")
        if estimator == "k1":
            value = advantage
        elif estimator == "k2":
            value = advantage.square() / 2
        else:
            value = torch.expm1(-advantage) + advantage
    logps = torch.where(mask, student_logps, 0)
    # The second factor is 0 and carries the gradient alone.
    estimate = value + advantage * (logps - logps.detach())
    return reduce_tokens(estimate, mask, reduction, num_items_in_batch)


def top_k_log_probs(
    logits: Logits, k: int, *, temperature: float = 1.0, chunk_size: int | None = None
) -> TopKLogProbs:
    """The k most probable tokens of each row, with the log of the mass of all others.

    Parameters
    ----------
    logits : Tensor of shape (..., V) or HiddenLogits
    k : int
        At most V.
    temperature : float, default=1.0
    chunk_size : int or None, default=None
        Rows at a time; None chooses.

    Returns
    -------
    TopKLogProbs
        Without a graph.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import top_k_log_probs
    >>> top = top_k_log_probs(torch.tensor([0.5, 0.3, 0.2]).log(), 1)
    >>> top.indices, top.log_probs.exp(), top.log_tail.exp()
    (tensor([0]), tensor([0.5000]), tensor([0.5000]))
    """
    check_integer("k", k, 1, vocabulary_size(logits))
    check_interval("temperature", temperature, 0, closed="neither")

    def columns(z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        log_p = torch.log_softmax(z / temperature, dim=-1)
        top = log_p.topk(k, dim=-1)
        tail = log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
        # One tensor leaves a reduction: ids are exact in float32 up to 2^24, in float64 always.
        return torch.cat([top.values, top.indices.to(log_p.dtype), tail], dim=-1), torch.zeros_like

    with torch.no_grad():
        packed = reduce_rows(columns, logits, chunk_size=chunk_size)
    return TopKLogProbs(
        packed[..., :k], packed[..., k:-1].long(), packed[..., -1:], float(temperature)
    )


def reduce_divergence(
    events: EventDivergence,
    student: Logits,
    teacher: Teacher,
    *,
    mask: Tensor | None,
    temperature: float,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    chunk_size: int | None,
) -> Tensor:
    """Check, run the divergence over rows, and reduce."""
    check_interval("temperature", temperature, 0, closed="neither")
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    shape = _leading_shape(student)
    sides: tuple[Logits, ...]
    if isinstance(teacher, TopKLogProbs):
        if teacher.temperature != temperature:
            raise ValueError(
                f"temperature must be that of the top-k log-probabilities, {teacher.temperature}, "
                f"got {temperature}"
            )
        rows: RowReduction = partial(_top_k_rows, events=events, temperature=temperature)
        sides = teacher[:3]
        if teacher.log_probs.shape[:-1] != shape:
            raise ValueError(
                f"teacher_logits must have the leading shape {tuple(shape)} of student_logits, "
                f"got {tuple(teacher.log_probs.shape[:-1])}"
            )
    else:
        _check_vocabularies(student, teacher)
        rows = partial(_full_rows, events=events, temperature=temperature)
        sides = (teacher,)
    first = student.hidden if isinstance(student, HiddenLogits) else student
    weights = _token_weights(mask, first)
    counts = weights != 0
    if reduction == "none":
        values = reduce_rows(rows, student, *sides, mask=counts, chunk_size=chunk_size).squeeze(-1)
        _check_values(values.detach(), counts, "divergence")
        return values * weights
    total = weights.new_ones(())
    if reduction == "mean" and num_items_in_batch is not None:
        total = torch.as_tensor(num_items_in_batch, device=weights.device)
        if not bool(total > 0):
            raise ValueError(f"num_items_in_batch must be positive, got {num_items_in_batch}")
    elif reduction == "mean":
        total = weights.sum()
        total = torch.where(total == 0, torch.ones_like(total), total)  # an empty mask: 0 / 1
    loss, values = sum_rows(
        rows, student, *sides, weights=weights / total, mask=counts, chunk_size=chunk_size
    )
    _check_values(values.squeeze(-1), counts, "divergence")
    return loss


def _full_rows(
    z: Tensor, teacher: Tensor, *, events: EventDivergence, temperature: float
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Every token an event."""
    value, gradient = events(_log_softmax(z, temperature), _log_softmax(teacher, temperature))

    def pullback(upstream: Tensor) -> Tensor:
        return gradient.mul_(upstream / temperature)

    return value, pullback


def _top_k_rows(
    z: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    log_tail: Tensor,
    *,
    events: EventDivergence,
    temperature: float,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The teacher's k tokens and the rest of the vocabulary as events.

    Tokens within an event share its gradient in proportion to the student's probabilities.
    """
    log_q = _log_softmax(z, temperature)
    top = log_q.gather(-1, indices)
    rest = log_q.scatter_(-1, indices, -torch.inf)
    log_rest = rest.logsumexp(-1, keepdim=True)
    # No other token: both sides of that event have mass 0 and it must not count, 0 log(0 / 0) = 0.
    empty = rest.shape[-1] == indices.shape[-1]
    log_tail = log_tail.to(log_q.dtype)
    ours, theirs = [top, log_rest], [log_probs.to(log_q.dtype), log_tail]
    n = -1 if empty else None
    value, gradient = events(torch.cat(ours[:n], -1), torch.cat(theirs[:n], -1))

    def pullback(upstream: Tensor) -> Tensor:
        scaled = gradient * (upstream / temperature)
        if empty:
            whole = torch.zeros_like(rest)
        else:
            whole = rest.sub(log_rest).exp_().mul_(scaled[..., -1:])
        return whole.scatter_(-1, indices, scaled[..., : indices.shape[-1]])

    return value, pullback


def _mixed_kl_events(
    log_q: Tensor, log_p: Tensor, *, reverse_weight: float
) -> tuple[Tensor, Tensor]:
    """Mixed KL of rows of log-probabilities and its gradient with respect to log q's logits."""
    if reverse_weight == 0:
        # A teacher's -inf is a probability of 0, which counts for nothing here.
        log_p = log_p.clamp_(min=_LOG_ZERO)
        p = log_p.exp()
        forward = rowwise_dot(p, log_p.sub_(log_q))
        return forward, log_q.exp_().sub_(p)
    q = log_q.exp()
    if reverse_weight == 1:
        ratio = log_q.sub_(log_p)
        reverse = rowwise_dot(q, ratio)
        return reverse, ratio.sub_(reverse).mul_(q)
    p = log_p.exp()
    ratio = log_q.sub_(log_p)
    reverse = rowwise_dot(q, ratio)
    forward = -rowwise_dot(p, ratio)
    value = reverse_weight * reverse + (1 - reverse_weight) * forward
    gradient = ratio.sub_(reverse).mul_(reverse_weight).add_(1 - reverse_weight).mul_(q)
    return value, gradient.sub_(p, alpha=1 - reverse_weight)


def _adaptive_kl_events(log_q: Tensor, log_p: Tensor, *, head_mass: float) -> tuple[Tensor, Tensor]:
    """Mixture with a weight a row, and its gradient in log q's logits."""
    q, p = log_q.exp(), log_p.exp()
    gap = (p - q).abs()
    ordered, order = p.sort(-1, descending=True)
    in_head = ordered.cumsum(-1) - ordered < head_mass
    head = (gap.gather(-1, order) * in_head).sum(-1, keepdim=True)
    weight = head / gap.sum(-1, keepdim=True).clamp(min=torch.finfo(gap.dtype).tiny)
    ratio = log_q.sub_(log_p)
    reverse, forward = rowwise_dot(q, ratio), -rowwise_dot(p, ratio)
    gradient = weight * (q - p) + (1 - weight) * ratio.sub_(reverse).mul_(q)
    return weight * forward + (1 - weight) * reverse, gradient


def _jsd_events(log_q: Tensor, log_p: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Generalized JSD of rows of log-probabilities and its gradient in log q's logits."""
    log_q, log_p = log_q.clamp_(min=_LOG_ZERO), log_p.clamp_(min=_LOG_ZERO)
    q, p = log_q.exp(), log_p.exp()
    # log m from the larger of the two, which stays exact where either underflows.
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    teacher = rowwise_dot(p, log_p.sub_(log_m))
    ratio = log_q.sub_(log_m)
    student = rowwise_dot(q, ratio)
    value = beta * teacher + (1 - beta) * student
    return value, ratio.sub_(student).mul_(q).mul_(1 - beta)


# exp of it is 0 in float32 and float64, and 0 times it is 0.
_LOG_ZERO = -1e4


def _log_softmax(z: Tensor, temperature: float) -> Tensor:
    """Log-softmax in a buffer of its own, as the events overwrite it."""
    return torch.log_softmax(z if temperature == 1 else z / temperature, dim=-1)


def _leading_shape(logits: Logits) -> torch.Size:
    return (logits.hidden if isinstance(logits, HiddenLogits) else logits).shape[:-1]


def _check_vocabularies(student: Logits, teacher: Logits) -> None:
    if vocabulary_size(student) != vocabulary_size(teacher):
        raise ValueError(
            f"teacher_logits must have the vocabulary of student_logits, "
            f"{vocabulary_size(student)}, "
            f"got {vocabulary_size(teacher)}: cut off padding, or use a cross-tokenizer loss where "
            "the tokenizers differ"
        )
    if _leading_shape(student) != _leading_shape(teacher):
        raise ValueError(
            f"teacher_logits must have the leading shape {tuple(_leading_shape(student))} of "
            f"student_logits, got {tuple(_leading_shape(teacher))}"
        )


def _token_weights(mask: Tensor | None, first: Tensor) -> Tensor:
    """Weights of the tokens in the dtype of the arithmetic."""
    shape = first.shape[:-1]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    if mask is None:
        return torch.ones(shape, dtype=dtype, device=first.device)
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    weights = mask.to(first.device, dtype)
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("mask must hold weights that are 0 or larger and finite")
    return weights


def _check_values(values: Tensor, counts: Tensor, what: str) -> None:
    bad = ~values.isfinite() & counts
    if bool(bad.any()):
        raise ValueError(
            f"student_logits and teacher_logits must give a finite {what}, got "
            f"{values[bad][0].item()} at {int(bad.sum())} of {int(counts.sum())} tokens: NaN among "
            "the logits, or a probability of 0 that the divergence divides by"
        )
