"""Universal logit distillation: compare sorted probabilities across tokenizers.

ULD needs no correspondence of tokens at all; the hybrid form compares tokens that both vocabularies
have directly. Both as in TRL's ``ULDLoss``, where a chunk of several rows is merged into one by
the probabilities of the tokens that came.

References
----------
.. [1] Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss
   for LLMs", arXiv:2402.12030, 2024.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sciml._check import check_choice, check_interval

from .aligned_chunks import merged_log_probs
from .chunk_comparison import (
    Average,
    Comparison,
    arithmetic_dtype,
    checked_inputs,
    chunk_weights,
    compare_chunks,
    nothing_to_compare,
    sorted_l1,
    tokens_outside,
    with_parts,
)
from .token_projection import TokenProjection
from .token_reduction import IGNORE_INDEX, next_token_labels
from .vocabulary_rows import Logits, rowwise_dot, vocabulary_size

__all__ = ["hybrid_uld_loss", "uld_loss"]

SMALLEST = 1e-8  # probabilities below it count as it, in TRL


def uld_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    student_chunks: Tensor,
    teacher_chunks: Tensor,
    *,
    student_ids: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    merge: str = "last",
    temperature: float = 1.0,
    shift: bool = True,
    average: Average = "sequence",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """L1 distance of sorted probabilities: universal logit distillation (ULD).

    A chunk of several rows is the distribution of one of them times the probabilities of the
    tokens that came at the others. Sorted in descending order, the shorter vocabulary padded with
    zeros, the two sides are subtracted.

    Parameters
    ----------
    student_logits, teacher_logits, student_chunks, teacher_chunks
        As in `projected_kl_loss`. Chunks of one token each, ``torch.arange(n)`` on both sides, give
        the ULD of the paper, which pairs tokens by position.
    student_ids, teacher_ids : LongTensor of shape (batch, n_tokens), optional
        Token ids; needed where a chunk has more than one token.
    merge : {"last", "first"}, default="last"
        The row that stands for a chunk: the last, times the probabilities of the earlier tokens,
        is the chain rule (TRL's "bayesian"); the first, times those of the later ones, is TRL's
        "observed".
    temperature : float, default=1.0
        Divides both logits. The loss is not multiplied by its square.
    shift : bool, default=True
        Whether row t predicts token t + 1. TRL's "observed" takes row t for token t:
        ``shift=False``.
    average : {"chunk", "sequence"}, default="sequence"
        TRL takes the mean over sequences of the mean over chunks.
    num_items_in_batch, chunk_size
        As in `projected_kl_loss`.

    Returns
    -------
    Tensor
        Scalar. Without a chunk it is 0, in the graph, with a warning.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or the loss is not finite.

    Notes
    -----
    TRL 1.16's ``ULDLoss`` gives the same with ``use_extended_uld=True``: ``"bayesian"`` for the
    defaults here, ``"observed"`` for ``merge="first", shift=False``; with
    ``use_extended_uld=False`` for chunks of one token each and the same shift.

    References
    ----------
    .. [1] Boizard et al., arXiv:2402.12030, 2024.
    """
    return _merged_loss(
        lambda student, teacher: _sorted_l1_comparison,
        student_logits,
        teacher_logits,
        (student_chunks, teacher_chunks),
        (student_ids, teacher_ids),
        None,
        merge=merge,
        temperature=temperature,
        shift=shift,
        average=average,
        num_items_in_batch=num_items_in_batch,
        chunk_size=chunk_size,
    )[0]


def hybrid_uld_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    student_chunks: Tensor,
    teacher_chunks: Tensor,
    projection: TokenProjection,
    *,
    student_ids: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    merge: str = "last",
    temperature: float = 1.0,
    shift: bool = True,
    average: Average = "sequence",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
    return_parts: bool = False,
) -> Any:
    """Jensen-Shannon divergence on matched tokens and ULD on the others: GOLD as in TRL.

    Differs from ``hybrid_kl_loss(threshold=1)``, GOLD as the authors of X-Token compare with it, in
    how a chunk's rows are merged (as in `uld_loss`), in the divergence, in padding the shorter
    sorted side with zeros, and in weights of the two terms.

    Parameters
    ----------
    student_logits, teacher_logits, student_chunks, teacher_chunks
        As in `projected_kl_loss`.
    projection : TokenProjection
        Matched tokens are its exact pairs, ``common_ids(1)``.
    student_ids, teacher_ids, merge, temperature, shift, average, num_items_in_batch, chunk_size
        As in `uld_loss`.
    beta : float in [0, 1], default=0.5
        Of the generalized Jensen-Shannon divergence, as in `generalized_jsd`; 0 is forward and 1
        reverse KL. Probabilities are taken as 1e-8 or more.
    matched_weight, unmatched_weight : float, optional
        Weights of the two terms, both or neither. By default the matched fraction of the teacher's
        vocabulary, and 1 minus it.
    return_parts : bool, default=False
        Whether to return the means of the two terms, "matched" and "unmatched", too.

    Returns
    -------
    loss : Tensor
    parts : dict of str to Tensor
        Where asked for; detached.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or the loss is not finite.
    """
    check_interval("beta", beta, 0, 1)
    if (matched_weight is None) != (unmatched_weight is None):
        raise ValueError(
            "matched_weight and unmatched_weight must be given both or neither, got "
            f"{matched_weight} and {unmatched_weight}"
        )
    for name, value in (("matched_weight", matched_weight), ("unmatched_weight", unmatched_weight)):
        if value is not None:
            check_interval(name, value, 0, math.inf, closed="left")
    common = projection.common_ids(1.0)

    def comparison(n_student: int, n_teacher: int) -> Comparison:
        ours = len(common[0]) / n_teacher if matched_weight is None else matched_weight
        theirs = 1 - ours if unmatched_weight is None else unmatched_weight
        return partial(
            _jsd_and_sorted_l1,
            common=common,
            rest=tokens_outside(common, n_student, n_teacher),
            beta=float(beta),
            weights=(float(ours), float(theirs)),
        )

    loss, parts = _merged_loss(
        comparison,
        student_logits,
        teacher_logits,
        (student_chunks, teacher_chunks),
        (student_ids, teacher_ids),
        projection,
        merge=merge,
        temperature=temperature,
        shift=shift,
        average=average,
        num_items_in_batch=num_items_in_batch,
        chunk_size=chunk_size,
    )
    named = {} if parts is None else {"matched": parts[0], "unmatched": parts[1]}
    return with_parts(loss, named, ("matched", "unmatched"), return_parts)


def _merged_loss(
    comparison: Callable[[int, int], Comparison],
    student_logits: Logits,
    teacher_logits: Logits,
    both_chunks: tuple[Tensor, Tensor],
    both_ids: tuple[Tensor | None, Tensor | None],
    projection: TokenProjection | None,
    *,
    merge: str,
    temperature: float,
    shift: bool,
    average: Average,
    num_items_in_batch: int | Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Loss that compares one row a chunk, times the probabilities of what came at the others."""
    check_choice("merge", merge, ("first", "last"))
    student, teacher, chunks = checked_inputs(
        student_logits, teacher_logits, *both_chunks, projection, shift, temperature
    )
    if len(chunks) == 0:
        return nothing_to_compare(student), None
    merged = []
    for side, logits, chunk, size, ids in (
        ("student", student, chunks.student, chunks.student_size, both_ids[0]),
        ("teacher", teacher, chunks.teacher, chunks.teacher_size, both_ids[1]),
    ):
        came = torch.full_like(chunk, IGNORE_INDEX)
        if ids is not None:
            if ids.shape != both_chunks[0 if side == "student" else 1].shape:
                raise ValueError(
                    f"{side}_ids must have the shape of {side}_chunks, "
                    f"{tuple(both_chunks[0 if side == 'student' else 1].shape)}, "
                    f"got {tuple(ids.shape)}"
                )
            came = (next_token_labels(ids) if shift else ids).reshape(-1)
            wrong = (came >= vocabulary_size(logits)) & (chunk >= 0)
            if bool(wrong.any()):
                raise ValueError(
                    f"{side}_ids must be below {vocabulary_size(logits)}, got {int(came[wrong][0])}"
                )
        elif bool((size > 1).any()):
            raise ValueError(
                f"{side}_ids must be given where a chunk has several {side} tokens, got None"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and side == "student"):
            merged.append(
                merged_log_probs(
                    logits,
                    chunk,
                    came,
                    len(chunks),
                    merge=merge,
                    temperature=temperature,
                    chunk_size=chunk_size,
                )
            )
    return compare_chunks(
        comparison(vocabulary_size(student), vocabulary_size(teacher)),
        merged[0],
        merged[1],
        chunk_weights(
            chunks, len(both_chunks[0]), average, num_items_in_batch, arithmetic_dtype(student)
        ),
        temperature,
        chunk_size,
    )


def _sorted_l1_comparison(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ULD: all tokens sorted."""
    p = log_p.exp()
    distance, gradient = sorted_l1(p, log_q.exp(), max(p.shape[1], log_q.shape[1]))
    return distance, distance.expand(-1, 2), gradient.mul_(p)


def _jsd_and_sorted_l1(
    log_p: Tensor,
    log_q: Tensor,
    *,
    common: tuple[Tensor, Tensor],
    rest: tuple[Tensor, Tensor],
    beta: float,
    weights: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """GOLD as in TRL. The divergence is of masses that do not sum to 1."""
    floor = math.log(SMALLEST)
    ours = log_p[:, common[0]]
    above = ours > floor
    ours, theirs = ours.clamp(min=floor), log_q[:, common[1]].clamp_(min=floor)
    p, q = ours.exp(), theirs.exp()
    if beta == 0:
        jsd, of_common = rowwise_dot(q, theirs - ours), -q
    elif beta == 1:
        ratio = ours - theirs
        jsd, of_common = rowwise_dot(p, ratio), (ratio + 1).mul_(p)
    else:
        log_m = torch.logaddexp(ours + math.log1p(-beta), theirs + math.log(beta))
        ratio = ours - log_m
        jsd = beta * rowwise_dot(q, theirs - log_m) + (1 - beta) * rowwise_dot(p, ratio)
        of_common = ratio.mul_(p).mul_(1 - beta)
    p_rest, q_rest = log_p[:, rest[0]].exp(), log_q[:, rest[1]].exp()
    n = max(len(rest[0]), len(rest[1])) if len(rest[0]) and len(rest[1]) else 0
    l1, of_rest = sorted_l1(p_rest, q_rest, n)
    gradient = torch.empty_like(log_p)
    gradient[:, common[0]] = of_common.mul_(above).mul_(weights[0])
    gradient[:, rest[0]] = of_rest.mul_(p_rest).mul_(weights[1])
    return weights[0] * jsd + weights[1] * l1, torch.cat([jsd, l1], dim=1), gradient
