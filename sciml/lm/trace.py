r"""TRACE: distil on a few marked tokens of a response, reinforce on all others.

Reinforcement learning from a verifier gives one number a response. A teacher, here the policy
itself shown a hint, gives a distribution a token, but matching it on every token wastes gradient
and leaks the hint. TRACE marks the spans that decide a response (at most a quarter of it), draws
the policy to the teacher on those only, and fades from there to plain GRPO within 40 steps [1]_:

    loss = 1/|y| sum_t g_t grpo_t  +  lambda / |y| sum_{t in span} KL_t

with ``g_t = 1`` off the spans and ``1 - lambda / w0`` on them. Key spans of right responses take
the forward divergence ``KL(teacher || student)``, error spans of wrong ones the reverse; for
student ``p``, teacher ``q`` and logits ``z`` of the student,

    dKL(q || p) / dz = p - q
    dKL(p || q) / dz = p (log p - log q - KL(p || q))

so the forward one pulls at tokens that the student never draws, and the reverse one does not.

References
----------
.. [1] Wang et al., "TRACE: Distilling Where It Matters via Token-Routed Self On-Policy Alignment",
   arXiv:2605.10194, 2026.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from sciml._check import check_choice, check_integer, check_interval

from .divergences import Teacher, reduce_divergence
from .grpo import grpo_loss
from .token_reduction import Reduction, supervised_labels, token_logps
from .vocabulary_rows import Logits, label_logp, sum_rows, tempered

__all__ = ["TraceLoss", "anneal_weight", "pointwise_clipped_kl"]


def anneal_weight(step: int, w0: float = 0.5, warmup: int = 10, decay: int = 30) -> float:
    """Weight of the divergence at an optimiser step: `w0`, then linearly to 0, then 0.

    Parameters
    ----------
    step : int
        From 0.
    w0 : float, default=0.5
    warmup, decay : int, default=10 and 30
        Steps at `w0`, and on the way to 0 (paper: these).

    Returns
    -------
    float

    Examples
    --------
    >>> from sciml.lm import anneal_weight
    >>> [round(anneal_weight(step), 4) for step in (0, 10, 25, 39, 40)]
    [0.5, 0.5, 0.25, 0.0167, 0.0]
    """
    check_integer("step", step, 0)
    check_interval("w0", w0, 0, math.inf, closed="left")
    check_integer("warmup", warmup, 0)
    check_integer("decay", decay, 0)
    if step < warmup:
        return float(w0)
    if step >= warmup + decay:
        return 0.0
    return float(w0) * (1 - (step - warmup) / decay)


def pointwise_clipped_kl(
    student_logits: Logits,
    teacher_logits: Teacher,
    *,
    direction: str = "forward",
    clip: float = 0.05,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Kullback-Leibler divergence whose terms are clipped from above, one vocabulary entry each.

    ``sum_v min(q_v (log q_v - log p_v), clip)`` for the teacher's q and the student's p (forward;
    reverse with p and q exchanged). A clipped term has no gradient, so that no single token of
    the vocabulary dominates. Terms below 0 stay, hence the sum may be negative: it is no
    divergence any more. Nor does it always draw the student to the teacher: where the teacher is
    nearly sure of a token its term is clipped, and what is left pushes to the other tokens.
    Teachers with several plausible tokens suffer less; ``clip=math.inf`` not at all. (The source
    does not say whether the clip has a lower side; here it has none.)

    Rows outside the mask are dropped before any softmax, of student and teacher: with
    `HiddenLogits` their logits are never computed.

    Parameters
    ----------
    student_logits : Tensor of shape (..., V) or HiddenLogits
        The rows are compared as they are: nothing is shifted.
    teacher_logits : Tensor of shape (..., V), HiddenLogits or TopKLogProbs
        The same leading shape and vocabulary. Its gradient is not taken.
    direction : {"forward", "reverse"}, default="forward"
    clip : float, default=0.05
        Above 0; ``math.inf`` gives `token_kl`.
    mask, temperature, reduction, num_items_in_batch, chunk_size
        As in `token_kl`.

    Returns
    -------
    Tensor
        Scalar, or of shape (...) for ``reduction="none"``. A mask without tokens gives 0 with a
        graph.

    Raises
    ------
    TypeError, ValueError
        As in `token_kl`; but where `clip` is finite a probability of 0 that is divided by only
        clips its term.

    References
    ----------
    .. [1] Wang et al., arXiv:2605.10194, 2026.

    Examples
    --------
    A teacher that is sure of a token to which the student gives 0.1: the one term is clipped.

    >>> import torch
    >>> from sciml.lm import pointwise_clipped_kl
    >>> student = torch.tensor([[0.1, 0.9]]).log().requires_grad_()
    >>> loss = pointwise_clipped_kl(student, torch.tensor([[1.0, 0.0]]).log())
    >>> loss.backward()
    >>> round(loss.item(), 4), student.grad.abs().max().item()
    (0.05, 0.0)
    """
    check_choice("direction", direction, ("forward", "reverse"))
    check_interval("clip", clip, 0, closed="right")
    return reduce_divergence(
        partial(_clipped_kl_events, reverse=direction == "reverse", clip=float(clip)),
        student_logits,
        teacher_logits,
        mask=mask,
        temperature=temperature,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        chunk_size=chunk_size,
    )


class TraceLoss(nn.Module):
    """GRPO's loss on all tokens but the marked ones, a clipped divergence on those, annealed.

    Parameters
    ----------
    w0 : float, default=0.5
        First weight of the divergence; 0 leaves GRPO alone.
    warmup, decay : int, default=10 and 30
        Steps at `w0` and on the way to 0.
    key_action : {"forward", "reverse"} or None, default="forward"
        Divergence on key spans. None leaves them to GRPO.
    error_action : {"forward", "reverse"} or None, default=None
        Divergence on error spans. The paper's two variants are ``("forward", None)`` for a strong
        base model (TRACE-FKL) and ``(None, "reverse")`` for a weak one (TRACE-RKL).
    kl_clip : float, default=0.05
        The paper's; see `pointwise_clipped_kl` for what it does to sure teachers.
    epsilon, epsilon_high : float, default=0.2 and 0.28
        Clip of the policy's ratio.
    temperature : float, default=1.0
        Divides all logits; that at which the responses were drawn.
    chunk_size : int or None, default=None
        Rows at a time, see `reduce_rows`.

    References
    ----------
    .. [1] Wang et al., arXiv:2605.10194, 2026.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import TraceLoss
    >>> student, teacher = torch.randn(2, 4, 10, requires_grad=True), torch.randn(2, 4, 10)
    >>> labels, advantages = torch.randint(10, (2, 4)), torch.tensor([1.0, -1.0])
    >>> key_mask = torch.zeros(2, 4, dtype=torch.bool)
    >>> key_mask[0, 1] = True
    >>> loss, stats = TraceLoss()(
    ...     student, teacher, labels, advantages, step=0, key_mask=key_mask
    ... )
    >>> stats["kl_weight"].item(), stats["coverage"].item()
    (0.5, 0.125)
    """

    def __init__(
        self,
        w0: float = 0.5,
        warmup: int = 10,
        decay: int = 30,
        *,
        key_action: str | None = "forward",
        error_action: str | None = None,
        kl_clip: float = 0.05,
        epsilon: float = 0.2,
        epsilon_high: float | None = 0.28,
        temperature: float = 1.0,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        anneal_weight(0, w0, warmup, decay)
        check_choice("key_action", key_action, ("forward", "reverse", None))
        check_choice("error_action", error_action, ("forward", "reverse", None))
        check_interval("kl_clip", kl_clip, 0, closed="right")
        check_interval("temperature", temperature, 0, math.inf, closed="neither")
        self.w0 = w0
        self.warmup = warmup
        self.decay = decay
        self.key_action = key_action
        self.error_action = error_action
        self.kl_clip = kl_clip
        self.epsilon = epsilon
        self.epsilon_high = epsilon_high
        self.temperature = temperature
        self.chunk_size = chunk_size

    def extra_repr(self) -> str:
        """Schedule and actions."""
        return (
            f"w0={self.w0}, warmup={self.warmup}, decay={self.decay}, "
            f"key_action={self.key_action!r}, error_action={self.error_action!r}"
        )

    def kl_weight(self, step: int) -> float:
        """Weight of the divergence at an optimiser step."""
        return anneal_weight(step, self.w0, self.warmup, self.decay)

    def forward(
        self,
        student_logits: Logits,
        teacher_logits: Teacher | None,
        labels: Tensor,
        advantages: Tensor,
        *,
        step: int,
        key_mask: Tensor | None = None,
        error_mask: Tensor | None = None,
        old_logps: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of responses, averaged over responses.

        Parameters
        ----------
        student_logits : Tensor of shape (batch, n_response, V) or HiddenLogits
            Row t predicts response token t: nothing is shifted.
        teacher_logits : Tensor of shape (batch, n_response, V), HiddenLogits, TopKLogProbs or None
            Only marked rows are read. May be None once the weight is 0, or if nothing is marked.
        labels : LongTensor of shape (batch, n_response)
            The response tokens, -100 beyond the end.
        advantages : Tensor of shape (batch,)
            `grpo_advantages`.
        step : int
            Optimiser step, from 0.
        key_mask, error_mask : BoolTensor of shape (batch, n_response), default=None
            Marked tokens (`route_tokens`); None marks none.
        old_logps : Tensor of shape (batch, n_response), default=None
            Log-probabilities under the policy that drew the responses. None: it was this one;
            then all ratios are 1 and the gradient is formed in the forward pass, from the rows
            whose coefficient is not 0.
        num_items_in_batch : int, Tensor or None, default=None
            Responses of the whole optimiser step, where this is one of its micro-batches.

        Returns
        -------
        loss : Tensor
            Scalar.
        stats : dict of str to Tensor
            Detached scalars: "policy_loss", "kl" (before its weight), "kl_weight" and "coverage"
            (share of tokens with a divergence).

        Raises
        ------
        TypeError, ValueError
            If shapes differ, the masks overlap or mark tokens outside the responses, or a teacher
            is missing where one is needed.
        """
        labels, mask = supervised_labels(student_logits, labels, shift=False)
        if labels.dim() != 2:
            raise ValueError(
                f"labels must be of shape (batch, n_response), got {tuple(labels.shape)}"
            )
        if advantages.shape != labels.shape[:1]:
            raise ValueError(
                f"advantages must have shape ({len(labels)},), got {tuple(advantages.shape)}"
            )
        key_mask = _check_span("key_mask", key_mask, mask)
        error_mask = _check_span("error_mask", error_mask, mask)
        if bool((key_mask & error_mask).any()):
            raise ValueError("key_mask and error_mask must not overlap")
        weight = self.kl_weight(step)
        spans = [
            (action, span)
            for action, span in ((self.key_action, key_mask), (self.error_action, error_mask))
            if action is not None and bool(span.any())
        ]
        marked = torch.zeros_like(mask)
        for _, span in spans:
            marked = marked | span
        fade = 1 - weight / self.w0 if self.w0 > 0 else 1.0
        first = student_logits if isinstance(student_logits, Tensor) else student_logits.hidden
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        n = len(mask) if num_items_in_batch is None else num_items_in_batch
        share = mask.to(dtype) / mask.sum(1, keepdim=True).clamp(min=1)
        share = share / torch.as_tensor(n, device=share.device).clamp(min=1)
        factor = torch.where(marked, fade, torch.ones_like(share))
        if old_logps is None:
            policy = self._on_policy(student_logits, labels, advantages, factor * share)
        else:
            logps, _ = token_logps(
                student_logits,
                labels,
                shift=False,
                temperature=self.temperature,
                chunk_size=self.chunk_size,
            )
            policy = grpo_loss(
                logps,
                advantages,
                mask,
                old_logps=old_logps,
                epsilon=self.epsilon,
                epsilon_high=self.epsilon_high,
                loss_type="grpo",
                weights=factor,
                num_items_in_batch=num_items_in_batch,
            )
        loss, kl = policy, policy.new_zeros(())
        if weight > 0:
            for action, span in spans:
                if teacher_logits is None:
                    raise ValueError(
                        f"teacher_logits must be given while the divergence has a weight "
                        f"({weight:.4g} at step {step}) and tokens are marked, got None"
                    )
                part = pointwise_clipped_kl(
                    student_logits,
                    teacher_logits,
                    direction=action,
                    clip=self.kl_clip,
                    mask=share * span,
                    temperature=self.temperature,
                    reduction="sum",
                    chunk_size=self.chunk_size,
                )
                loss, kl = loss + weight * part, kl + part.detach()
        stats = {
            "policy_loss": policy.detach(),
            "kl": kl,
            "kl_weight": torch.tensor(weight),
            "coverage": (marked & (weight > 0)).sum() / mask.sum().clamp(min=1),
        }
        return loss, stats

    def _on_policy(
        self, logits: Logits, labels: Tensor, advantages: Tensor, share: Tensor
    ) -> Tensor:
        """GRPO's loss at ratios of 1: its value is known, and so is what each row is worth."""
        coefficient = -share * advantages.detach().to(share).unsqueeze(1)
        if not bool(coefficient.isfinite().all()):
            raise ValueError("advantages must be finite, got NaN or infinity among its values")
        total, _ = sum_rows(
            tempered(label_logp, self.temperature),
            logits,
            labels,
            weights=coefficient,
            mask=coefficient != 0,
            chunk_size=self.chunk_size,
        )
        return total - total.detach() + coefficient.sum()


# exp of it is 0, and 0 times it is 0; the other is clipped whatever positive number it multiplies.
_LOG_ZERO, _CLIPPED = -1e4, -1e30


def _clipped_kl_events(
    log_p: Tensor, log_q: Tensor, *, reverse: bool, clip: float
) -> tuple[Tensor, Tensor]:
    """Clipped divergence of rows, student log p and teacher log q, and its gradient in logits."""
    outer, inner = (log_p, log_q) if reverse else (log_q, log_p)
    inner = inner if clip == math.inf else inner.clamp(min=_CLIPPED)
    weight = outer.exp()
    ratio = outer.clamp(min=_LOG_ZERO).sub_(inner)
    terms = weight * ratio
    clipped = terms > clip
    value = terms.clamp_(max=clip).sum(-1, keepdim=True)
    if reverse:
        kept = weight.mul_(ratio.add_(1)).masked_fill_(clipped, 0)  # p dD/dp
        total = kept.sum(-1, keepdim=True)
        return value, kept.sub_(log_p.exp_().mul_(total))
    kept = weight.masked_fill_(clipped, 0)
    total = kept.sum(-1, keepdim=True)
    return value, log_p.exp_().mul_(total).sub_(kept)


def _check_span(name: str, span: Tensor | None, mask: Tensor) -> Tensor:
    if span is None:
        return torch.zeros_like(mask)
    if span.dtype != torch.bool or span.shape != mask.shape:
        raise ValueError(
            f"{name} must be a bool tensor of shape {tuple(mask.shape)}, got {span.dtype} of "
            f"shape {tuple(span.shape)}"
        )
    span = span.to(mask.device)
    if bool((span & ~mask).any()):
        raise ValueError(f"{name} must mark response tokens only, got marks where labels are -100")
    return span
