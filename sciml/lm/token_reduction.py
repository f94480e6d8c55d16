"""Per-token values of a language-model loss: shifted labels, log-probabilities and their mean."""

from typing import Literal

import torch
from torch import Tensor

from .._check import check_choice, check_interval
from .vocabulary_rows import (
    HiddenLogits,
    Logits,
    label_logp,
    reduce_rows,
    tempered,
    vocabulary_size,
)

__all__ = [
    "IGNORE_INDEX",
    "Reduction",
    "next_token_labels",
    "reduce_tokens",
    "sequence_logps",
    "supervised_labels",
    "token_logps",
    "token_weights",
]

IGNORE_INDEX = -100
Reduction = Literal["mean", "sum", "none"]


def next_token_labels(labels: Tensor) -> Tensor:
    """Labels moved one step to the left, so that row t of the logits predicts entry t.

    Parameters
    ----------
    labels : LongTensor of shape (..., n_tokens)

    Returns
    -------
    LongTensor of shape (..., n_tokens)
        The last entry is -100. Moving the labels spares a slice, and its copy, of the logits.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import next_token_labels
    >>> next_token_labels(torch.tensor([[5, 6, 7]]))
    tensor([[   6,    7, -100]])
    """
    shifted = labels.roll(-1, dims=-1)
    shifted[..., -1:] = IGNORE_INDEX
    return shifted


def supervised_labels(
    logits: Logits, labels: Tensor, *, shift: bool = True
) -> tuple[Tensor, Tensor]:
    """Labels as the rows of logits predict them, and where there is one; both are checked.

    Parameters
    ----------
    logits : Tensor of shape (..., n_tokens, vocabulary_size) or HiddenLogits
    labels : LongTensor of shape (..., n_tokens)
        -100 where nothing is to be predicted.
    shift : bool, default=True
        Whether row t predicts label t + 1, as the labels of transformers are laid out.

    Returns
    -------
    labels : LongTensor of shape (..., n_tokens)
    mask : BoolTensor of shape (..., n_tokens)

    Raises
    ------
    TypeError
        If labels are not integers.
    ValueError
        If the shapes disagree.
    IndexError
        If a label is no token of the vocabulary; the message tells its position.
    """
    rows = logits.hidden if isinstance(logits, HiddenLogits) else logits
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != rows.shape[:-1]:
        raise ValueError(
            f"labels must have shape {tuple(rows.shape[:-1])}, as the logits have, "
            f"got {tuple(labels.shape)}"
        )
    n_tokens = vocabulary_size(logits)
    bad = ((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= n_tokens)
    if bool(bad.any()):
        position = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"labels must be -100 or in [0, {n_tokens}), got {int(labels[position])} at {position}"
        )
    labels = labels.long()
    if shift:
        labels = next_token_labels(labels)
    return labels, labels != IGNORE_INDEX


def token_logps(
    logits: Logits,
    labels: Tensor,
    *,
    shift: bool = True,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label.

    Parameters
    ----------
    logits : Tensor of shape (..., n_tokens, vocabulary_size) or HiddenLogits
    labels : LongTensor of shape (..., n_tokens)
        -100 where nothing is to be predicted.
    shift : bool, default=True
        Whether row t predicts label t + 1.
    temperature : float, default=1.0
        Divides the logits.
    chunk_size : int, optional
        Rows a chunk, see `reduce_rows`.

    Returns
    -------
    logps : Tensor of shape (..., n_tokens)
        Entry t is what row t says of its label; 0 where there is none.
    mask : BoolTensor of shape (..., n_tokens)
        Where there is one.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `supervised_labels`.
    """
    labels, mask = supervised_labels(logits, labels, shift=shift)
    reduction = tempered(label_logp, temperature)
    logps = reduce_rows(reduction, logits, labels, mask=mask, chunk_size=chunk_size)
    return logps.squeeze(-1), mask


def sequence_logps(
    logits: Logits, labels: Tensor, *, shift: bool = True, chunk_size: int | None = None
) -> Tensor:
    """Log-probability of each sequence: the sum over its labelled tokens.

    Parameters
    ----------
    logits, labels, shift, chunk_size
        As for `token_logps`.

    Returns
    -------
    Tensor of shape (...)
    """
    logps, _ = token_logps(logits, labels, shift=shift, chunk_size=chunk_size)
    return logps.sum(-1)


def reduce_tokens(
    values: Tensor,
    mask: Tensor,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Reduce per-token values to a loss.

    Parameters
    ----------
    values : Tensor of shape (..., n_tokens)
    mask : BoolTensor of the same shape
        Tokens that count.
    reduction : {"mean", "sum", "none"}, default="mean"
        "none" gives the values, with 0 where the mask is False.
    num_items_in_batch : int or Tensor, optional
        Number of tokens in all the micro-batches of one optimiser step, as
        `transformers.Trainer` passes it: "mean" then divides the sum by it.

    Returns
    -------
    Tensor
        A scalar, or the shape of `values` for "none". Without a single token it is 0, still part
        of the graph.
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if values.shape != mask.shape:
        raise ValueError(
            f"values and mask must have the same shape, got {tuple(values.shape)} and "
            f"{tuple(mask.shape)}"
        )
    values = torch.where(mask, values, 0)
    if reduction == "none":
        return values
    return values.sum() / _divisor(mask, reduction, num_items_in_batch)


def token_weights(
    mask: Tensor,
    reduction: Literal["mean", "sum"] = "mean",
    num_items_in_batch: int | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights for `sum_rows` under which it gives what `reduce_tokens` gives.

    Parameters
    ----------
    mask, reduction, num_items_in_batch
        As for `reduce_tokens`.
    dtype : torch.dtype, default=torch.float32
        Of the weights; float64 for logits in float64.

    Returns
    -------
    Tensor of the shape of `mask`
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    return mask.to(dtype) / _divisor(mask, reduction, num_items_in_batch)


def _divisor(
    mask: Tensor, reduction: Reduction, num_items_in_batch: int | Tensor | None
) -> Tensor | float:
    if reduction == "sum":
        return 1.0
    if num_items_in_batch is None:
        return mask.sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        items = num_items_in_batch.to(mask.device)
        return torch.where(items > 0, items, 1)  # a step without a single label: 0 / 1
    check_interval("num_items_in_batch", num_items_in_batch, 0, closed="left")
    return float(num_items_in_batch or 1)
