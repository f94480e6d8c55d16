"""Logits of two tokenizations, chunk by chunk of their common text.

A chunk has one row of logits or more on either side. Cross-tokenizer losses compare one vector a
chunk: a mean over its rows of some function of each row (`chunk_sums`), the mean of their
log-probabilities (`mean_log_probs`), or one row times the probabilities that the others give to
what came (`merged_log_probs`). All read logits through the row reductions of `vocabulary_rows`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .token_reduction import IGNORE_INDEX
from .vocabulary_rows import (
    HiddenLogits,
    Logits,
    RowReduction,
    label_logp,
    log_sum_exp,
    reduce_rows,
    rowwise_dot,
    sum_rows,
    tempered,
)

__all__ = [
    "AlignedChunks",
    "aligned_chunks",
    "chunk_sums",
    "flat_rows",
    "mean_log_probs",
    "merged_log_probs",
]


class AlignedChunks(NamedTuple):
    """Chunks that have rows on both sides, numbered through a batch.

    Attributes
    ----------
    student, teacher : LongTensor of shape (batch * n_tokens,)
        Chunk of each row of the logits; -1 for none.
    student_size, teacher_size : LongTensor of shape (n_chunks,)
        Rows of each chunk.
    sequence : LongTensor of shape (n_chunks,)
        Where in the batch the chunk is.
    """

    student: Tensor
    teacher: Tensor
    student_size: Tensor
    teacher_size: Tensor
    sequence: Tensor

    def __len__(self) -> int:
        return len(self.sequence)


def aligned_chunks(
    student_chunks: Tensor, teacher_chunks: Tensor, *, shift: bool = True
) -> AlignedChunks:
    """Chunks of tokens as chunks of rows of logits.

    Parameters
    ----------
    student_chunks, teacher_chunks : LongTensor of shape (batch, n_tokens)
        Number of each token's chunk within its sequence; -1 for none. The two may have different
        lengths.
    shift : bool, default=True
        Whether row t of the logits predicts token t + 1. A chunk with the first token of a
        sequence, which no row predicts, is then left out.

    Returns
    -------
    AlignedChunks

    Raises
    ------
    TypeError
        If chunks are no integers.
    ValueError
        If shapes do not fit, or numbers are below -1 or above the number of tokens.
    """
    for name, chunks in (("student_chunks", student_chunks), ("teacher_chunks", teacher_chunks)):
        if chunks.is_floating_point() or chunks.is_complex() or chunks.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {chunks.dtype}")
        if chunks.dim() != 2 or len(chunks) != len(student_chunks):
            raise ValueError(
                f"{name} must have shape ({len(student_chunks)}, n_tokens), "
                f"got {tuple(chunks.shape)}"
            )
        bad = (chunks < -1) | (chunks >= max(student_chunks.shape[-1], teacher_chunks.shape[-1]))
        if bool(bad.any()):
            raise ValueError(
                f"{name} must be numbers of chunks in a sequence, or -1, got {int(chunks[bad][0])}"
            )
    n_sequences = len(student_chunks)
    stride = max(student_chunks.shape[1], teacher_chunks.shape[1], 1)
    offset = stride * torch.arange(n_sequences, device=student_chunks.device)[:, None]
    rows, counts = [], []
    valid = torch.ones(n_sequences * stride, dtype=torch.bool, device=student_chunks.device)
    for chunks in (student_chunks.long(), teacher_chunks.long()):
        flat = torch.where(chunks >= 0, chunks + offset, -1)
        if shift and flat.shape[1] > 0:
            unpredicted = flat[:, 0]
            valid[unpredicted[unpredicted >= 0]] = False
            flat = flat.roll(-1, dims=1)
            flat[:, -1] = -1
        flat = flat.reshape(-1)
        count = torch.bincount(flat[flat >= 0], minlength=len(valid))
        valid &= count > 0
        rows.append(flat)
        counts.append(count)
    number = torch.where(valid, valid.cumsum(0) - 1, -1)
    student, teacher = (torch.where(flat >= 0, number[flat.clamp(min=0)], -1) for flat in rows)
    sequence = valid.nonzero().squeeze(-1) // stride
    return AlignedChunks(student, teacher, counts[0][valid], counts[1][valid], sequence)


def flat_rows(logits: Logits) -> Logits:
    """Logits with one leading dimension."""
    if isinstance(logits, HiddenLogits):
        return logits._replace(hidden=logits.hidden.reshape(-1, logits.hidden.shape[-1]))
    return logits.reshape(-1, logits.shape[-1])


def chunk_sums(
    reduction: RowReduction,
    logits: Logits,
    chunk: Tensor,
    n_chunks: int,
    n_values: int,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum of a row reduction over the rows of every chunk, differentiable in the logits.

    Values are added up as rows are reduced, so that wide values of all rows never exist at once;
    the backward pass reduces the rows again.

    Parameters
    ----------
    reduction : callable
        A row reduction without side inputs.
    logits : Tensor of shape (n_rows, vocabulary_size) or HiddenLogits
    chunk : LongTensor of shape (n_rows,)
        Chunk of each row; rows with -1 are not read.
    n_chunks, n_values : int
        Shape of the result.
    chunk_size : int, optional
        Rows at a time, see `reduce_rows`.

    Returns
    -------
    Tensor of shape (n_chunks, n_values)
        In float32, or float64 for float64 logits.
    """
    tensors = tuple(logits) if isinstance(logits, HiddenLogits) else (logits,)
    shape = (n_chunks, n_values)
    return _ChunkSums.apply(reduction, chunk, shape, chunk_size, *tensors)


class _ChunkSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        reduction: RowReduction,
        chunk: Tensor,
        shape: tuple[int, int],
        chunk_size: int | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        logits = _logits(tensors)
        first = tensors[0]
        assert first is not None
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        sums = torch.zeros(shape, dtype=dtype, device=first.device)

        def add(rows: Tensor, index: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            values, pullback = reduction(rows)
            sums.index_add_(0, index, values)
            return values[:, :1], pullback

        if bool((chunk >= 0).any()):
            reduce_rows(add, logits, chunk, mask=chunk >= 0, chunk_size=chunk_size)
        ctx.reduction, ctx.chunk_size = reduction, chunk_size
        device = first.device.type
        ctx.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        ctx.save_for_backward(chunk, *tensors)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        chunk, *tensors = ctx.saved_tensors

        def inner_product(rows: Tensor, index: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            values, pullback = ctx.reduction(rows)
            weights = upstream[index]
            return rowwise_dot(values, weights), lambda one: pullback(weights.mul_(one))

        needed = ctx.needs_input_grad[4:]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(chunk.device.type, dtype, enabled=enabled):
            leaves = [
                None if tensor is None else tensor.detach().requires_grad_(need)
                for tensor, need in zip(tensors, needed, strict=True)
            ]
            # The products with the upstream gradient are known: gradients form in one pass.
            total, _ = sum_rows(
                inner_product,
                _logits(leaves),
                chunk,
                weights=torch.ones(chunk.shape, device=chunk.device),
                mask=chunk >= 0,
                chunk_size=ctx.chunk_size,
            )
        wanted = [
            leaf for leaf, need in zip(leaves, needed, strict=True) if need and leaf is not None
        ]
        gradients = iter(torch.autograd.grad(total, wanted))
        return (
            None,
            None,
            None,
            None,
            *(
                next(gradients) if need and leaf is not None else None
                for leaf, need in zip(leaves, needed, strict=True)
            ),
        )


def mean_log_probs(
    logits: Logits,
    chunk: Tensor,
    size: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Logits, Tensor]:
    """Mean over each chunk's rows of their log-probabilities, as logits and an offset.

    The mean of log-softmaxes is the mean of the logits minus a number. Hidden states are averaged
    instead of logits, so the output layer is applied once a chunk.

    Parameters
    ----------
    logits : Tensor of shape (n_rows, vocabulary_size) or HiddenLogits
    chunk : LongTensor of shape (n_rows,)
    size : LongTensor of shape (n_chunks,)
    temperature : float, default=1.0
    chunk_size : int, optional

    Returns
    -------
    logits : Tensor of shape (n_chunks, vocabulary_size) or HiddenLogits
    offset : Tensor of shape (n_chunks,)
        Not above 0. ``log_softmax(logits / temperature) + offset`` is the mean.
    """
    first = logits.hidden if isinstance(logits, HiddenLogits) else logits
    several = size > 1
    rows = (chunk >= 0).nonzero().squeeze(-1)
    if bool(several.any()):
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        total = first.new_zeros(len(size), first.shape[-1], dtype=wide)
        total = total.index_add(0, chunk[rows], first[rows].to(wide))
        mean = (total / size[:, None]).to(first.dtype)
    else:
        mean = first[torch.empty_like(rows).scatter(0, chunk[rows], rows)]
    result = logits._replace(hidden=mean) if isinstance(logits, HiddenLogits) else mean
    # Of a single row the offset is 0.
    reduction = tempered(log_sum_exp, temperature)
    split = (chunk >= 0) & several[chunk.clamp(min=0)] if len(size) else chunk >= 0
    each = reduce_rows(reduction, logits, mask=split, chunk_size=chunk_size).squeeze(-1)
    whole = reduce_rows(reduction, result, mask=several, chunk_size=chunk_size).squeeze(-1)
    return result, whole.index_add(0, chunk[split], -each[split] / size[chunk[split]])


def merged_log_probs(
    logits: Logits,
    chunk: Tensor,
    labels: Tensor,
    n_chunks: int,
    *,
    merge: str,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Logits, Tensor]:
    """One row of each chunk, and the log-probability of what came at its other rows.

    Parameters
    ----------
    logits : Tensor of shape (n_rows, vocabulary_size) or HiddenLogits
    chunk : LongTensor of shape (n_rows,)
    labels : LongTensor of shape (n_rows,)
        The token that came at each row; -100 gives log-probability 0.
    n_chunks : int
    merge : {"first", "last"}
        Which row stands for the chunk.
    temperature : float, default=1.0
    chunk_size : int, optional

    Returns
    -------
    logits : Tensor of shape (n_chunks, vocabulary_size) or HiddenLogits
    offset : Tensor of shape (n_chunks,)
        Each probability is taken as 1e-8 or more, as in TRL.
    """
    first = logits.hidden if isinstance(logits, HiddenLogits) else logits
    rows = (chunk >= 0).nonzero().squeeze(-1)
    chosen = rows.new_full((n_chunks,), len(chunk) if merge == "first" else -1)
    reduce = "amin" if merge == "first" else "amax"
    chosen = chosen.scatter_reduce(0, chunk[rows], rows, reduce)
    others = chunk >= 0
    others[chosen] = False
    reduction = tempered(label_logp, temperature)
    logps = reduce_rows(
        reduction,
        logits,
        torch.where(others, labels, IGNORE_INDEX),
        mask=others,
        chunk_size=chunk_size,
    ).squeeze(-1)
    logps = logps[others].clamp(min=torch.tensor(1e-8, dtype=logps.dtype).log().item())
    offset = logps.new_zeros(n_chunks).index_add(0, chunk[others], logps)
    selected = first[chosen]
    result = logits._replace(hidden=selected) if isinstance(logits, HiddenLogits) else selected
    return result, offset


def _logits(tensors: Sequence[Tensor | None]) -> Logits:
    return HiddenLogits(*tensors) if len(tensors) == 3 else tensors[0]  # type: ignore[arg-type, return-value]
