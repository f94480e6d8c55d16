"""Supervised fine-tuning that spares the tokens of which the model is least sure or has drifted.

In each batch the tokens with the largest entropy H of the model's prediction and those with the
largest KL(model || reference) leave the cross-entropy. What is asked of them instead is to keep
their entropy and to stay close to the reference, the model before fine-tuning::

    loss = mean of -log p(label) over the other tokens
           - lambda_entropy * mean of H / log V over the k tokens of largest H
           + lambda_kl * mean of KL(model || reference) over the k tokens of largest KL,

k = int(top_k_ratio * number of supervised tokens). The λ are raised by 5 % while the entropy is
below its target (the KL above its own) and lowered by 5 % otherwise, in each step anew.

The abstract of the paper names only the masking; the two terms come from the official code. Where
the default (``variant="aligned"``) departs from that code:

- Row t of the logits predicts label t + 1, and its scores decide about that label. The official
  code lets the scores of row t decide about label t, which row t - 1 predicts.
- The KL term is the KL. The official code sums p (p - log p_ref), which is KL + H + Σp².
- k = 0 gives plain fine-tuning, where the official code divides by zero.
- The model runs once: scores are read off the pass that is differentiated, not off another one.
- With `num_items_in_batch` a micro-batch counts by its share of the supervised tokens of the step.

``variant="official"`` keeps the first two, to reproduce numbers.

References
----------
Liu, Sun, He, Zheng, Xu, Zheng, Wang, Chen, "Entropy-KL Divergence-based Token Masking: A Novel
Approach for Selective Fine-tuning of Large Language Models", arXiv:2605.29303, 2026.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sciml._check import check_choice, check_finite, check_interval

from .token_reduction import IGNORE_INDEX, supervised_labels
from .trainer_losses import ReferenceLossMixin
from .vocabulary_rows import (
    Logits,
    Pullback,
    check_same_vocabulary,
    finite_log_softmax,
    reduce_rows,
    rowwise_dot,
    vocabulary_size,
)

__all__ = ["EKSFTMask", "EKSFTTrainerMixin", "eksft_loss", "eksft_mask"]

Combine = Literal["union", "intersection"]
Variant = Literal["aligned", "official"]


class EKSFTMask(NamedTuple):
    """Which tokens learn from their label, which from entropy, which from the reference.

    Attributes
    ----------
    ce : BoolTensor of shape (batch, n_tokens)
        Tokens that stay in the cross-entropy.
    entropy : BoolTensor of shape (batch, n_tokens)
        The k tokens selected by entropy.
    kl : BoolTensor of shape (batch, n_tokens)
        The k tokens selected by KL.
    """

    ce: Tensor
    entropy: Tensor
    kl: Tensor


def eksft_mask(
    entropy: Tensor,
    kl: Tensor,
    labels: Tensor,
    *,
    top_k_ratio: float = 0.2,
    combine: Combine = "union",
    largest_entropy: bool = True,
    largest_kl: bool = True,
    scope: Literal["batch", "sequence"] = "batch",
) -> EKSFTMask:
    """Select the tokens that leave the cross-entropy by entropy and by KL.

    Parameters
    ----------
    entropy, kl : Tensor of shape (batch, n_tokens)
        Scores of the tokens. They are compared, not differentiated.
    labels : LongTensor or BoolTensor of shape (batch, n_tokens)
        -100 (or False) where there is nothing to learn; the entry of a token stands where its
        scores stand: pass `next_token_labels` of a model's labels.
    top_k_ratio : float in [0, 1], default=0.2
        Share of the supervised tokens to select by each score, rounded down.
    combine : {"union", "intersection"}, default="union"
        Whether a token leaves if one score selects it or if both do.
    largest_entropy, largest_kl : bool, default=True
        Whether to select the largest or the smallest scores.
    scope : {"batch", "sequence"}, default="batch"
        Whether tokens are ranked over the whole batch (the official code) or within each row.

    Returns
    -------
    EKSFTMask

    Raises
    ------
    ValueError
        If shapes differ, the ratio is outside [0, 1], no token is supervised or a supervised
        token's score is not finite.

    References
    ----------
    Liu et al., arXiv:2605.29303.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import eksft_mask
    >>> entropy, kl = torch.tensor([[3.0, 1.0, 2.0, 9.0]]), torch.tensor([[0.1, 0.5, 0.3, 9.0]])
    >>> labels = torch.tensor([[5, 6, 7, -100]])
    >>> eksft_mask(entropy, kl, labels, top_k_ratio=0.4).ce
    tensor([[False, False,  True, False]])
    """
    check_interval("top_k_ratio", top_k_ratio, 0, 1)
    check_choice("combine", combine, ("union", "intersection"))
    check_choice("scope", scope, ("batch", "sequence"))
    for name, tensor in (("kl", kl), ("labels", labels)):
        if tensor.shape != entropy.shape or tensor.dim() != 2:
            raise ValueError(
                f"{name} must have shape (batch, n_tokens) like entropy, got {tuple(tensor.shape)} "
                f"where entropy has {tuple(entropy.shape)}"
            )
    mask = labels if labels.dtype == torch.bool else labels != IGNORE_INDEX
    if not bool(mask.any()):
        raise ValueError("labels must supervise at least one token, got none other than -100")
    by_entropy = _top(entropy, mask, top_k_ratio, largest_entropy, scope, "entropy")
    by_kl = _top(kl, mask, top_k_ratio, largest_kl, scope, "kl")
    removed = by_entropy | by_kl if combine == "union" else by_entropy & by_kl
    return EKSFTMask(mask & ~removed, by_entropy, by_kl)


@overload
def eksft_loss(
    logits: Logits,
    labels: Tensor,
    *,
    ref_logits: Logits,
    top_k_ratio: float = ...,
    lambda_entropy: float = ...,
    lambda_kl: float = ...,
    combine: Combine = ...,
    largest_entropy: bool = ...,
    largest_kl: bool = ...,
    scope: Literal["batch", "sequence"] = ...,
    target_entropy: float = ...,
    target_kl: float = ...,
    adapt: bool = ...,
    variant: Variant = ...,
    num_items_in_batch: int | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    chunk_size: int | None = ...,
) -> Tensor: ...


@overload
def eksft_loss(
    logits: Logits,
    labels: Tensor,
    *,
    ref_logits: Logits,
    top_k_ratio: float = ...,
    lambda_entropy: float = ...,
    lambda_kl: float = ...,
    combine: Combine = ...,
    largest_entropy: bool = ...,
    largest_kl: bool = ...,
    scope: Literal["batch", "sequence"] = ...,
    target_entropy: float = ...,
    target_kl: float = ...,
    adapt: bool = ...,
    variant: Variant = ...,
    num_items_in_batch: int | Tensor | None = ...,
    return_parts: Literal[True],
    chunk_size: int | None = ...,
) -> tuple[Tensor, dict[str, Tensor]]: ...


def eksft_loss(
    logits: Logits,
    labels: Tensor,
    *,
    ref_logits: Logits,
    top_k_ratio: float = 0.2,
    lambda_entropy: float = 0.05,
    lambda_kl: float = 0.05,
    combine: Combine = "union",
    largest_entropy: bool = True,
    largest_kl: bool = True,
    scope: Literal["batch", "sequence"] = "batch",
    target_entropy: float = 0.5,
    target_kl: float = 2.0,
    adapt: bool = True,
    variant: Variant = "aligned",
    num_items_in_batch: int | Tensor | None = None,
    return_parts: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Compute the EKSFT loss: cross-entropy of the other tokens, entropy and KL of the selected.

    Parameters
    ----------
    logits : Tensor of shape (batch, n_tokens, V) or HiddenLogits
        Of the model in training. Read once for scores, loss and its value; with `HiddenLogits`
        the (batch, n_tokens, V) array never exists.
    labels : LongTensor of shape (batch, n_tokens)
        As for transformers, not shifted: row t predicts label t + 1; -100 is not supervised.
    ref_logits : Tensor of shape (batch, n_tokens, V) or HiddenLogits
        Of the reference, for the same inputs. It receives no gradient.
    top_k_ratio, combine, largest_entropy, largest_kl, scope
        As for `eksft_mask`. 0.2 and "union" are those of the official launch script.
    lambda_entropy, lambda_kl : float, default=0.05
        Weights of the two terms (the launch script's).
    target_entropy : float, default=0.5
        Entropy, as a share of log V, below which `lambda_entropy` is raised.
    target_kl : float, default=2.0
        KL above which `lambda_kl` is raised.
    adapt : bool, default=True
        Whether to raise or lower the λ by 5 %.
    variant : {"aligned", "official"}, default="aligned"
        "official" keeps the misaligned mask and the KL term of the official code, see above.
    num_items_in_batch : int, Tensor or None, default=None
        Supervised tokens of all micro-batches of the step; the loss is then weighted by this
        micro-batch's share of them, so that the sum over micro-batches is a weighted mean.
    return_parts : bool, default=False
        Whether to return the terms as well.
    chunk_size : int or None, default=None
        Rows a chunk, see `reduce_rows`.

    Returns
    -------
    Tensor or (Tensor, dict of str to Tensor)
        The loss; with `return_parts` also, detached: ``ce``, ``entropy`` (share of log V), ``kl``,
        ``lambda_entropy``, ``lambda_kl``, ``masked`` (share of tokens that left the
        cross-entropy). A mean over no token is 0.

    Raises
    ------
    ValueError
        If no token is supervised, shapes or vocabularies differ, or an option is out of range.

    References
    ----------
    Liu et al., arXiv:2605.29303.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import eksft_loss
    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator object at ...>
    >>> logits, ref_logits = torch.randn(2, 2, 10, 50)
    >>> labels = torch.arange(20).reshape(2, 10)
    >>> loss, parts = eksft_loss(logits, labels, ref_logits=ref_logits, return_parts=True)
    >>> f"{parts['masked']:.2f}"  # 3 of 18 tokens by each score
    '0.33'
    """
    check_choice("variant", variant, ("aligned", "official"))
    for name, value in (
        ("lambda_entropy", lambda_entropy),
        ("lambda_kl", lambda_kl),
        ("target_entropy", target_entropy),
        ("target_kl", target_kl),
    ):
        check_interval(name, value, 0, math.inf, closed="left")
    if labels.dim() != 2:
        raise ValueError(f"labels must have shape (batch, n_tokens), got {tuple(labels.shape)}")
    shifted, mask = supervised_labels(logits, labels)
    check_same_vocabulary(logits, ref_logits)
    scored = mask if variant == "aligned" else mask | (labels != IGNORE_INDEX)
    reduction = _statistics if variant == "aligned" else _official_statistics
    values = reduce_rows(reduction, logits, shifted, ref_logits, mask=scored, chunk_size=chunk_size)
    logp, entropy, kl = values[..., :3].unbind(-1)
    kl_term = values[..., -1]  # the KL itself, or what the official code takes for it

    # Official: scores of row t decide about label t, which row t - 1 predicts.
    places = mask if variant == "aligned" else labels != IGNORE_INDEX
    selected = eksft_mask(
        entropy.detach(),
        kl.detach(),
        places,
        top_k_ratio=top_k_ratio,
        combine=combine,
        largest_entropy=largest_entropy,
        largest_kl=largest_kl,
        scope=scope,
    )
    of_labels = selected.ce if variant == "aligned" else F.pad(selected.ce[:, 1:], (0, 1))

    ce = _mean(-logp, of_labels)
    normalized_entropy = _mean(entropy, selected.entropy) / math.log(vocabulary_size(logits))
    mean_kl = _mean(kl_term, selected.kl)
    # The given weights are moved in each step; nothing accumulates.
    weight_entropy = _adapted(lambda_entropy, normalized_entropy < target_entropy, adapt, mean_kl)
    weight_kl = _adapted(lambda_kl, mean_kl > target_kl, adapt, mean_kl)
    loss = ce - weight_entropy * normalized_entropy + weight_kl * mean_kl
    if num_items_in_batch is not None:
        loss = loss * (mask.sum() / num_items_in_batch)
    if not return_parts:
        return loss
    n_tokens = mask.sum()
    parts = {
        "ce": ce,
        "entropy": normalized_entropy,
        "kl": mean_kl,
        "lambda_entropy": weight_entropy,
        "lambda_kl": weight_kl,
        "masked": (n_tokens - of_labels.sum()) / n_tokens.clamp(min=1),
    }
    return loss, {name: value.detach() for name, value in parts.items()}


class EKSFTTrainerMixin(ReferenceLossMixin):
    """Mixin for `Trainer` and `SFTTrainer`: fine-tuning with EKSFT.

    ``class MyTrainer(EKSFTTrainerMixin, SFTTrainer): pass``. The reference is the model without
    its PEFT adapters, or `ref_model`. The terms of the loss are logged.

    Parameters
    ----------
    *args, **kwargs
        Of the trainer.
    objective : callable, default=None
        `eksft_loss` with other options, ``partial(eksft_loss, top_k_ratio=0.1,
        return_parts=True)``. None means its defaults.
    ref_model : torch.nn.Module, default=None
        A frozen copy of the model before fine-tuning; needed unless the model has adapters.
    from_hidden_states : bool, default=False
        Never build the (batch, n_tokens, V) logits, see `hidden_logits`.

    References
    ----------
    Liu et al., arXiv:2605.29303.

    Examples
    --------
    >>> from transformers import Trainer
    >>> from sciml.lm import EKSFTTrainerMixin
    >>> class EKSFTTrainer(EKSFTTrainerMixin, Trainer):
    ...     pass
    """

    def __init__(
        self,
        *args: Any,
        objective: Callable[..., Any] | None = None,
        ref_model: nn.Module | None = None,
        from_hidden_states: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            objective=objective or partial(eksft_loss, return_parts=True),
            ref_model=ref_model,
            from_hidden_states=from_hidden_states,
            **kwargs,
        )


def _statistics(logits: Tensor, labels: Tensor, ref_logits: Tensor) -> tuple[Tensor, Pullback]:
    """Log-probability of the label, entropy and KL(model || reference), by one softmax."""
    logp = finite_log_softmax(logits)
    p = logp.exp()
    ratio = logp - finite_log_softmax(ref_logits)
    valid = (labels >= 0).unsqueeze(-1)
    index = labels.clamp(min=0).unsqueeze(-1)
    of_label = torch.where(valid, logp.gather(-1, index), 0)
    entropy, kl = -rowwise_dot(p, logp), rowwise_dot(p, ratio)

    def pullback(upstream: Tensor) -> Tensor:
        on_label, on_entropy, on_kl = upstream.split(1, dim=-1)
        on_label = torch.where(valid, on_label, 0)
        # p (-u_label - u_H (log p + H) + u_KL (log p / p_ref - KL)) + u_label at the label
        inner = ratio.mul_(on_kl).addcmul_(logp, on_entropy, value=-1)
        inner.sub_(on_label + on_entropy * entropy + on_kl * kl)
        return inner.mul_(p).scatter_add_(-1, index, on_label)

    return torch.cat([of_label, entropy, kl], dim=-1), pullback


def _official_statistics(
    logits: Tensor, labels: Tensor, ref_logits: Tensor
) -> tuple[Tensor, Pullback]:
    """The same and what the official code takes for the KL, the sum of p (p - log p_ref)."""
    values, pullback_of_three = _statistics(logits, labels, ref_logits)
    p = logits.softmax(-1)
    derivative = 2 * p - finite_log_softmax(ref_logits)
    term = rowwise_dot(p, derivative - p)

    def pullback(upstream: Tensor) -> Tensor:
        of_three, on_term = upstream.split([3, 1], dim=-1)
        of_term = (derivative - rowwise_dot(p, derivative)).mul_(p).mul_(on_term)
        return of_term.add_(pullback_of_three(of_three))

    return torch.cat([values, term], dim=-1), pullback


def _top(
    scores: Tensor, mask: Tensor, ratio: float, largest: bool, scope: str, name: str
) -> Tensor:
    """Where the k largest (or smallest) scores under the mask are."""
    scores = torch.where(mask, scores if largest else -scores, 0)
    check_finite(name, scores)
    rows = scores.masked_fill(~mask, -math.inf)
    if scope == "batch":
        rows, mask = rows.reshape(1, -1), mask.reshape(1, -1)
    order = rows.argsort(dim=-1, descending=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(rows.shape[-1], device=rows.device).expand_as(order)
    )
    # In float64 int(0.2 * 5) is 1, as in Python; a float32 product could round down.
    k = (mask.sum(-1, keepdim=True).double() * ratio).long()
    return ((rank < k) & mask).reshape(scores.shape)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask; 0, still part of the graph, if it is empty."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def _adapted(weight: float, too_little: Tensor, adapt: bool, like: Tensor) -> Tensor:
    """The weight, 5 % up where the term does too little, else 5 % down."""
    up, down = (1.05, 0.95) if adapt else (1.0, 1.0)
    return torch.where(too_little, like.new_tensor(weight * up), like.new_tensor(weight * down))
