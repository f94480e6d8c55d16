"""Compare chunks of two tokenizations, one vector of log-probabilities on either side."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sciml._check import check_choice, check_interval

from .aligned_chunks import AlignedChunks, aligned_chunks, flat_rows
from .token_projection import TokenProjection
from .token_reduction import token_weights
from .vocabulary_rows import (
    HiddenLogits,
    Logits,
    finite_log_softmax,
    sum_rows,
    vocabulary_size,
)

__all__ = [
    "Average",
    "Comparison",
    "arithmetic_dtype",
    "check_finite_chunks",
    "checked_inputs",
    "chunk_weights",
    "compare_chunks",
    "first_tensor",
    "nothing_to_compare",
    "sorted_l1",
    "tokens_outside",
    "with_parts",
]

Average = Literal["chunk", "sequence"]
# What is compared of a chunk: from log-probabilities of both sides (n, V_s), (n, V_t) the loss
# (n, 1), two parts of it (n, 2) and its gradient (n, V_s) with respect to the student's.
Comparison = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def compare_chunks(
    compare: Comparison,
    student: tuple[Logits, Tensor],
    teacher: tuple[Logits, Tensor],
    weights: Tensor,
    temperature: float,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of a comparison over chunks, and of its parts."""
    logits, offset = student

    def reduction(
        z: Tensor, ours: Tensor, teacher_z: Tensor, theirs: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        log_p = finite_log_softmax(z / temperature)
        log_q = finite_log_softmax(teacher_z / temperature).add_(theirs)
        loss, parts, gradient = compare(log_p + ours, log_q)
        slope = gradient.sum(1, keepdim=True)

        def pullback(upstream: Tensor) -> Tensor:
            # Of log_softmax: the gradient minus p times its sum.
            result = gradient.sub_(log_p.exp_().mul_(slope))
            return result.mul_(upstream[:, :1] / temperature)

        return torch.cat([loss, slope, parts], dim=1), pullback

    # Only the loss has a gradient in the logits; the slope carries it to the offset.
    columns = torch.zeros(len(weights), 4, dtype=weights.dtype, device=weights.device)
    columns[:, 0] = weights
    loss, values = sum_rows(
        reduction,
        logits,
        offset[:, None],
        teacher[0],
        teacher[1][:, None],
        weights=columns,
        chunk_size=chunk_size,
    )
    check_finite_chunks(values[:, 0])
    of_offset = (weights * values[:, 1] * (offset - offset.detach())).sum()
    return loss + of_offset, weights @ values[:, 2:]


def sorted_l1(p: Tensor, q: Tensor, n: int, padded: bool = False) -> tuple[Tensor, Tensor]:
    """L1 distance of the `n` largest entries of rows, and its gradient with respect to p.

    Where one side has fewer than n entries it is padded with zeros.
    """
    distance = p.new_zeros(len(p), 1)
    gradient = torch.zeros_like(p)
    n_p, n_q = min(n, p.shape[1]), min(n, q.shape[1])
    ours, order = p.topk(n_p, dim=1)
    theirs = q.topk(n_q, dim=1).values
    shared = min(n_p, n_q)
    difference = ours[:, :shared] - theirs[:, :shared]
    distance += difference.abs().sum(1, keepdim=True)
    gradient.scatter_(1, order[:, :shared], difference.sign())
    if n_p > shared:
        distance += ours[:, shared:].sum(1, keepdim=True)
        gradient.scatter_(1, order[:, shared:], 1.0)
    distance += theirs[:, shared:].sum(1, keepdim=True)
    return distance, gradient


def checked_inputs(
    student_logits: Logits,
    teacher_logits: Logits,
    student_chunks: Tensor,
    teacher_chunks: Tensor,
    projection: TokenProjection | None,
    shift: bool,
    temperature: float,
) -> tuple[Logits, Logits, AlignedChunks]:
    """Flat logits of both sides, the teacher's without padding of the vocabulary, and chunks."""
    check_interval("temperature", temperature, 0, math.inf, closed="neither")
    for name, logits, chunks in (
        ("student", student_logits, student_chunks),
        ("teacher", teacher_logits, teacher_chunks),
    ):
        if first_tensor(logits).shape[:-1] != chunks.shape:
            raise ValueError(
                f"{name}_chunks must have the leading shape of {name}_logits, "
                f"{tuple(first_tensor(logits).shape[:-1])}, got {tuple(chunks.shape)}"
            )
    if projection is not None:
        n_student, n_teacher = vocabulary_size(student_logits), vocabulary_size(teacher_logits)
        if n_student < projection.n_student_tokens:
            raise ValueError(
                f"student_logits must score the {projection.n_student_tokens} tokens of the "
                f"projection or more, got {n_student}"
            )
        if n_teacher < projection.n_teacher_tokens:
            raise ValueError(
                f"teacher_logits must score the {projection.n_teacher_tokens} tokens of the "
                f"projection or more, got {n_teacher}"
            )
        if n_teacher > projection.n_teacher_tokens:
            teacher_logits = _first_columns(teacher_logits, projection.n_teacher_tokens)
    aligned = aligned_chunks(student_chunks, teacher_chunks, shift=shift)
    teacher = flat_rows(teacher_logits)
    if isinstance(teacher, HiddenLogits):
        bias = None if teacher.bias is None else teacher.bias.detach()
        teacher = HiddenLogits(teacher.hidden.detach(), teacher.weight.detach(), bias)
    else:
        teacher = teacher.detach()
    return flat_rows(student_logits), teacher, aligned


def _first_columns(logits: Logits, n: int) -> Logits:
    if isinstance(logits, HiddenLogits):
        bias = None if logits.bias is None else logits.bias[:n]
        return HiddenLogits(logits.hidden, logits.weight[:n], bias)
    return logits[..., :n]


def chunk_weights(
    chunks: AlignedChunks,
    n_sequences: int,
    average: str,
    num_items_in_batch: int | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Weight of each chunk."""
    check_choice("average", average, ("chunk", "sequence"))
    if average == "chunk":
        counted = torch.ones_like(chunks.sequence, dtype=torch.bool)
        return token_weights(counted, "mean", num_items_in_batch, dtype)
    if num_items_in_batch is not None:
        raise ValueError(
            "num_items_in_batch counts chunks: average must be 'chunk', got 'sequence'"
        )
    size = torch.bincount(chunks.sequence, minlength=n_sequences)
    return (1 / (n_sequences * size[chunks.sequence])).to(dtype)


def tokens_outside(
    common: tuple[Tensor, Tensor], n_student: int, n_teacher: int
) -> tuple[Tensor, Tensor]:
    """Tokens of either side that are in no pair."""
    result = []
    for ids, n in zip(common, (n_student, n_teacher), strict=True):
        alone = torch.ones(n, dtype=torch.bool, device=ids.device)
        alone[ids] = False
        result.append(alone.nonzero().squeeze(1))
    return result[0], result[1]


def nothing_to_compare(student: Logits) -> Tensor:
    """A zero in the graph, with a warning."""
    warnings.warn(
        "no chunk of the batch has rows on both sides, so the distillation loss is 0: do both "
        "sides read the same text?",
        stacklevel=3,
    )
    first = first_tensor(student)
    return first[:0].sum().to(arithmetic_dtype(student))


def check_finite_chunks(values: Tensor) -> None:
    """Raise ValueError if a chunk's loss is NaN or infinite."""
    bad = ~values.detach().isfinite()
    if bool(bad.any()):
        raise ValueError(
            "student_logits and teacher_logits must give a finite loss, got "
            f"{values[bad][0].item()} in {int(bad.sum())} of {len(values)} chunks"
        )


def first_tensor(logits: Logits) -> Tensor:
    """The logits, or the hidden states that stand for them."""
    return logits.hidden if isinstance(logits, HiddenLogits) else logits


def arithmetic_dtype(logits: Logits) -> torch.dtype:
    """float64 for float64 logits, else float32, as the row reductions compute."""
    return torch.float64 if first_tensor(logits).dtype == torch.float64 else torch.float32


def with_parts(
    loss: Tensor, parts: dict[str, Tensor], zero: Sequence[str], return_parts: bool
) -> Any:
    """What a loss returns: itself, and its parts where asked for."""
    if not return_parts:
        return loss
    return loss, parts or {name: loss.detach() for name in zero}
