r"""Keep a fine-tuned model's ranking of the other tokens near its base model's (TMKL).

Xu, Garg, Saratchandran and Lucey, "Mask the Target: A Plug-and-Play Regularizer Against LoRA
Forgetting", arXiv:2605.29498, 2026. At each supervised position with target y the target is taken
out of the base model's distribution p and of the adapted model's q, both are renormalised, and

.. math:: \ell = KL(p^{-y} \| q^{-y}), \qquad L = -\log q_y + \lambda \, \ell .

The gradient of :math:`\ell` with respect to the logits is :math:`q^{-y} - p^{-y}` off the target
and 0 on it, so the regulariser does not fight what cross-entropy teaches. It is a factor of the
full divergence: KL(p || q) = KL of the two-way split (target, rest) + (1 - p_y) :math:`\ell`.

What the paper's text did not tell us: the direction of the divergence (base || adapted here, the
other is offered), the temperature (1) and whether positions are weighted by 1 - p_y (no).
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._check import check_choice, check_integer, check_interval
from .token_reduction import Reduction, reduce_tokens, supervised_labels, token_weights
from .trainer_losses import ReferenceLossMixin
from .vocabulary_rows import (
    Logits,
    Pullback,
    RowReduction,
    check_same_vocabulary,
    combine,
    label_logp,
    reduce_rows,
    rowwise_dot,
    sum_rows,
    tempered,
    vocabulary_size,
)

__all__ = ["TargetMaskedKL", "TargetMaskedKLTrainerMixin", "target_masked_kl"]

Direction = Literal["forward", "reverse"]


def target_masked_kl(
    logits: Logits,
    labels: Tensor,
    *,
    ref_logits: Logits,
    direction: Direction = "forward",
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    shift: bool = True,
    chunk_size: int | None = None,
) -> Tensor:
    """KL divergence between base and adapted model over all tokens but the target.

    Parameters
    ----------
    logits : Tensor of shape (..., n_tokens, vocabulary_size) or HiddenLogits
        Of the adapted model, in any floating dtype; computed in float32 (float64 stays).
    labels : LongTensor of shape (..., n_tokens)
        -100 where nothing is supervised.
    ref_logits : as `logits`
        Of the base model; no gradient flows into them.
    direction : {"forward", "reverse"}, default="forward"
        KL(base || adapted) or KL(adapted || base).
    temperature : float, default=1.0
        Divides both logits; the value is multiplied by its square.
    reduction : {"mean", "sum", "none"}, default="mean"
        Over supervised positions.
    num_items_in_batch : int or Tensor, optional
        Divisor of "mean" instead of the number of supervised positions.
    shift : bool, default=True
        Whether row t predicts label t + 1, as the labels of transformers are laid out.
    chunk_size : int, optional
        Rows computed at once, see `reduce_rows`.

    Returns
    -------
    Tensor
        A scalar, or shape (..., n_tokens) for "none", 0 where nothing is supervised.

    Raises
    ------
    ValueError
        If the vocabularies or shapes differ or an option is not allowed.
    IndexError
        If a label is no token of the vocabulary.

    References
    ----------
    .. [1] Xu, Garg, Saratchandran, Lucey, "Mask the Target: A Plug-and-Play Regularizer Against
       LoRA Forgetting", arXiv:2605.29498, 2026.

    Examples
    --------
    >>> import math
    >>> import torch
    >>> from sciml.lm import target_masked_kl
    >>> base = torch.tensor([[9.0, 0.0, 0.0]])
    >>> adapted = torch.tensor([[-5.0, math.log(3), 0.0]])
    >>> loss = target_masked_kl(adapted, torch.tensor([0]), ref_logits=base, shift=False)
    >>> round(loss.item(), 6)  # KL((1/2, 1/2) || (3/4, 1/4))
    0.143841
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    columns = _columns(direction, temperature)
    labels, mask = _supervised(logits, labels, ref_logits, shift)
    sides = (ref_logits, labels)
    scale = temperature**2
    if reduction == "none":
        values = reduce_rows(columns, logits, *sides, mask=mask, chunk_size=chunk_size)
        return scale * values[..., 1]
    weights = scale * token_weights(mask, reduction, num_items_in_batch)
    weights = torch.stack([torch.zeros_like(weights), weights], dim=-1)
    loss, _ = sum_rows(columns, logits, *sides, weights=weights, mask=mask, chunk_size=chunk_size)
    return loss


class TargetMaskedKL(nn.Module):
    """Cross-entropy plus `weight` times the target-masked KL divergence from the base model.

    Both come from one pass over the logits: with the log-sum-exp of the tokens other than the
    target at hand, the target's log-probability is one more logistic function.

    Parameters
    ----------
    weight : float, default=1.0
        The λ of the paper, whose value we do not know; {0.1, 0.3, 1, 3} is a sensible sweep.
    direction : {"forward", "reverse"}, default="forward"
        See `target_masked_kl`.
    temperature : float, default=1.0
        Of the divergence only.
    chunk_size : int, optional
        Rows computed at once, see `reduce_rows`.

    Raises
    ------
    ValueError
        If `weight` is negative or an option is not allowed.

    References
    ----------
    .. [1] Xu, Garg, Saratchandran, Lucey, "Mask the Target: A Plug-and-Play Regularizer Against
       LoRA Forgetting", arXiv:2605.29498, 2026.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import TargetMaskedKL
    >>> objective = TargetMaskedKL(weight=0.5)
    >>> logits = torch.zeros(1, 4, 10, requires_grad=True)
    >>> labels = torch.tensor([[-100, 3, 4, 5]])
    >>> loss = objective(logits, labels, ref_logits=torch.zeros(1, 4, 10))
    >>> round(loss.item(), 4)  # no drift: cross-entropy alone, log 10
    2.3026
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        direction: Direction = "forward",
        temperature: float = 1.0,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_interval("weight", weight, 0, closed="left")
        self.weight = weight
        self.direction = direction
        self.temperature = temperature
        self.chunk_size = chunk_size
        _columns(direction, temperature)  # checks both

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"weight={self.weight}, direction={self.direction!r}, temperature={self.temperature}"

    def forward(
        self,
        logits: Logits,
        labels: Tensor,
        *,
        ref_logits: Logits,
        reduction: Reduction = "mean",
        num_items_in_batch: int | Tensor | None = None,
        shift: bool = True,
        return_parts: bool = False,
    ) -> Any:
        """Loss of a batch.

        Parameters
        ----------
        logits, labels, ref_logits, reduction, num_items_in_batch, shift
            As for `target_masked_kl`.
        return_parts : bool, default=False
            Also return what the loss is made of.

        Returns
        -------
        loss : Tensor
            A scalar, or shape (..., n_tokens) for "none".
        parts : dict of str to Tensor
            Only with `return_parts`: `nll` and `target_masked_kl`, means over the supervised
            positions of this batch, detached.
        """
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        labels, mask = _supervised(logits, labels, ref_logits, shift)
        columns = _columns(self.direction, self.temperature)
        sides = (ref_logits, labels)
        kl_weight = self.weight * self.temperature**2
        if reduction == "none":
            values = reduce_rows(columns, logits, *sides, mask=mask, chunk_size=self.chunk_size)
            loss = kl_weight * values[..., 1] - values[..., 0]
        else:
            weights = token_weights(mask, reduction, num_items_in_batch)
            loss, values = sum_rows(
                columns,
                logits,
                *sides,
                weights=torch.stack([-weights, kl_weight * weights], dim=-1),
                mask=mask,
                chunk_size=self.chunk_size,
            )
        if not return_parts:
            return loss
        values = values.detach()
        return loss, {
            "nll": -reduce_tokens(values[..., 0], mask),
            "target_masked_kl": self.temperature**2 * reduce_tokens(values[..., 1], mask),
        }


class TargetMaskedKLTrainerMixin(ReferenceLossMixin):
    """Mixin for `Trainer` and TRL's `SFTTrainer` that trains with `TargetMaskedKL`.

    The base model is the PEFT model with its adapters off, or `ref_model`. Both parts of the loss
    are logged as `nll` and `target_masked_kl`.

    Parameters
    ----------
    *args, **kwargs
        Of the trainer.
    weight, direction, temperature
        As for `TargetMaskedKL`.
    ref_model, from_hidden_states
        As for `ReferenceLossMixin`.

    Raises
    ------
    ValueError
        If the model has no PEFT adapters and there is no `ref_model`.

    Examples
    --------
    >>> from transformers import Trainer
    >>> from sciml.lm import TargetMaskedKLTrainerMixin
    >>> class TargetMaskedKLTrainer(TargetMaskedKLTrainerMixin, Trainer):
    ...     pass
    """

    def __init__(
        self,
        *args: Any,
        weight: float = 1.0,
        direction: Direction = "forward",
        temperature: float = 1.0,
        ref_model: nn.Module | None = None,
        from_hidden_states: bool = False,
        **kwargs: Any,
    ) -> None:
        objective = TargetMaskedKL(weight, direction=direction, temperature=temperature)
        super().__init__(
            *args,
            objective=partial(objective, return_parts=True),
            ref_model=ref_model,
            from_hidden_states=from_hidden_states,
            **kwargs,
        )


def _supervised(
    logits: Logits, labels: Tensor, ref_logits: Logits, shift: bool
) -> tuple[Tensor, Tensor]:
    check_same_vocabulary(logits, ref_logits)
    check_integer("the size of the vocabulary", vocabulary_size(logits), 2)
    return supervised_labels(logits, labels, shift=shift)


def _columns(direction: Direction, temperature: float) -> RowReduction:
    """Reduction of (logits, reference logits, labels) to log q_y and the divergence."""
    check_choice("direction", direction, ("forward", "reverse"))
    reductions: dict[str, RowReduction] = {"forward": _forward, "reverse": _reverse}
    if temperature == 1:
        return reductions[direction]
    divergence = _second_column(tempered(reductions[direction], temperature))
    return combine((label_logp, [1]), (divergence, [0, 1]))


def _second_column(reduction: RowReduction) -> RowReduction:
    def second(*arguments: Tensor) -> tuple[Tensor, Pullback]:
        values, pullback = reduction(*arguments)

        def padded(upstream: Tensor) -> Tensor:
            return pullback(torch.cat([torch.zeros_like(upstream), upstream], dim=-1))

        return values[:, 1:], padded

    return second


def _forward(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> tuple[Tensor, Pullback]:
    index = labels.unsqueeze(-1)
    others, q, lse = _without_target(logits, index)
    ref_others, p, ref_lse = _without_target(ref_logits, index)
    logp = -nn.functional.softplus(lse - logits.gather(-1, index))
    kl = rowwise_dot(p, ref_others.sub_(others)) - ref_lse + lse

    def pullback(upstream: Tensor) -> Tensor:
        of_logp, of_kl = upstream[:, :1], upstream[:, 1:]
        of_target = -of_logp * torch.expm1(logp)  # 1 - q_y
        gradient = q.mul_(of_kl - of_target).addcmul_(p, of_kl, value=-1)
        return gradient.scatter_(-1, index, of_target)

    return torch.cat([logp, kl], dim=-1), pullback


def _reverse(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> tuple[Tensor, Pullback]:
    index = labels.unsqueeze(-1)
    others, q, lse = _without_target(logits, index)
    ref_others, _, ref_lse = _without_target(ref_logits, index)
    logp = -nn.functional.softplus(lse - logits.gather(-1, index))
    difference = others.sub_(ref_others)
    kl = rowwise_dot(q, difference) - lse + ref_lse

    def pullback(upstream: Tensor) -> Tensor:
        of_logp, of_kl = upstream[:, :1], upstream[:, 1:]
        of_target = -of_logp * torch.expm1(logp)
        # d KL / d z_v = q_v (z_v - b_v - lse + ref_lse - KL)
        difference.add_(ref_lse - lse - kl).mul_(of_kl).sub_(of_target)
        return q.mul_(difference).scatter_(-1, index, of_target)

    return torch.cat([logp, kl], dim=-1), pullback


def _without_target(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits without the target, their softmax and their log-sum-exp.

    The target, and tokens forbidden by -inf, get the same finite number in both models, so that
    they differ by 0 and weigh 0. The log-sum-exp is computed over the others, since
    log(exp(lse) - exp(target)) cancels where the target is nearly certain.
    """
    others = logits.clamp(min=-1e30).scatter_(-1, index, -1e30)
    q = others.softmax(-1)
    return others, q, others.amax(-1, keepdim=True) - q.amax(-1, keepdim=True).log()
