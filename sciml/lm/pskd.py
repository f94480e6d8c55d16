"""Train on the model's own predictions of the epoch before, ever more: PS-KD.

The target of sample i in epoch t (of T) is

    q_i = (1 - alpha_t) y_i + alpha_t P_{t-1}(x_i),        alpha_t = alpha_T t / T,

y_i one-hot and P_{t-1}(x_i) the softmax that the network gave the sample when it last trained on it
[1]_; the loss is the cross entropy to q_i. The gradient with respect to the logits is
P_t - q: samples that became easier since the last epoch lose more of theirs than those that stay
hard.

`ProgressiveSelfKDLoss` is for classifiers, `ProgressiveSelfKDTokenLoss` for language models, where
only the most probable tokens of a prediction are kept. What is read is what the last training
forward of the sample gave (train mode, augmented input, before the optimiser's step), as in the
authors' code (lgcnsai/PS-KD-Pytorch, MIT): there is no second forward. A sample that was not seen
yet has its label for a target; the code leaves a target that sums to 1 - alpha_t, if that happens
after the first epoch.

References
----------
.. [1] Kim, Ji, Yoon and Hwang, "Self-Knowledge Distillation with Progressive Refinement of
   Targets", ICCV 2021, arXiv:2006.12000.
"""

import os
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import check_choice, check_finite, check_integer, check_interval
from .prediction_store import PredictionStore, gather_rows
from .token_reduction import Reduction, supervised_labels, token_weights
from .vocabulary_rows import Logits, RowReduction, reduce_rows, sum_rows, vocabulary_size

__all__ = [
    "ProgressiveSelfKDLoss",
    "ProgressiveSelfKDTokenLoss",
    "linear_alpha",
    "pskd_loss",
    "pskd_token_loss",
    "top_k_predictions",
]


def linear_alpha(epoch: int, total_epochs: int, alpha_T: float = 0.8) -> float:
    """Weight of the earlier prediction in an epoch: alpha_T (epoch + 1) / total_epochs.

    Parameters
    ----------
    epoch : int
        Number of the epoch, from 0; the last, ``total_epochs - 1``, has `alpha_T` itself.
    total_epochs : int
        Number of epochs.
    alpha_T : float, default=0.8
        Weight in the last epoch (0.8: tuned on CIFAR-100 [1]_).

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If `epoch` is not among the epochs or `alpha_T` not in [0, 1].

    References
    ----------
    .. [1] Kim et al., arXiv:2006.12000.

    Examples
    --------
    >>> from sciml.lm import linear_alpha
    >>> [round(linear_alpha(epoch, 300), 4) for epoch in (0, 149, 299)]
    [0.0027, 0.4, 0.8]
    """
    check_integer("total_epochs", total_epochs, 1)
    check_integer("epoch", epoch, 0, total_epochs - 1)
    check_interval("alpha_T", alpha_T, 0, 1)
    return float(alpha_T * (epoch + 1) / total_epochs)


def pskd_loss(
    logits: Tensor,
    target: Tensor,
    previous: Tensor,
    alpha: float,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Cross entropy to a mixture of the one-hot label and an earlier prediction.

    Parameters
    ----------
    logits : Tensor of shape (n_samples, n_classes)
        Scores; half precision is computed in float32.
    target : LongTensor of shape (n_samples,)
        Labels.
    previous : Tensor of shape (n_samples, n_classes)
        Probabilities that were predicted before; constants.
    alpha : float
        Their weight, in [0, 1]; see `linear_alpha`.
    reduction : {"mean", "sum", "none"}, default="mean"
        Over the samples.

    Returns
    -------
    Tensor
        A scalar, or of shape (n_samples,) with "none".

    Raises
    ------
    TypeError
        If `logits` are not of a floating dtype or `target` is not integer.
    ValueError
        If shapes disagree, labels are no classes, logits are not finite, or `alpha` is outside
        [0, 1].

    References
    ----------
    .. [1] Kim et al., arXiv:2006.12000.

    Examples
    --------
    With uniform predictions it is label smoothing:

    >>> import torch
    >>> from sciml.lm import pskd_loss
    >>> logits, target = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    >>> float(pskd_loss(logits, target, torch.full((1, 3), 1 / 3), alpha=0.3))
    0.669...
    >>> float(torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.3))
    0.669...
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_interval("alpha", alpha, 0, 1)
    _check_classification(logits, target)
    if previous.shape != logits.shape:
        raise ValueError(
            f"previous must have shape {tuple(logits.shape)} as logits, got {tuple(previous.shape)}"
        )
    return _soft_cross_entropy(logits, target, previous.detach(), alpha, reduction)


class _ProgressiveLoss(nn.Module):
    """Epoch and weight of a loss that mixes in earlier predictions."""

    def __init__(self, total_epochs: int, alpha_T: float) -> None:
        super().__init__()
        linear_alpha(0, total_epochs, alpha_T)
        self.total_epochs = total_epochs
        self.alpha_T = alpha_T
        self.epoch = 0

    @property
    def alpha(self) -> float:
        """Weight of the earlier prediction in this epoch."""
        return linear_alpha(self.epoch, self.total_epochs, self.alpha_T)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, from 0 to ``total_epochs - 1``."""
        check_integer("epoch", epoch, 0, self.total_epochs - 1)
        self.epoch = int(epoch)

    def get_extra_state(self) -> Tensor:
        """Return the epoch, for the state dict."""
        return torch.tensor(self.epoch)

    def set_extra_state(self, state: Tensor) -> None:
        """Set the epoch, from the state dict."""
        self.set_epoch(int(state))

    def extra_repr(self) -> str:
        """Describe the schedule."""
        return f"total_epochs={self.total_epochs}, alpha_T={self.alpha_T}"


class ProgressiveSelfKDLoss(_ProgressiveLoss):
    """PS-KD for a classifier: keeps each sample's last prediction and mixes it into its target.

    Call `set_epoch` before each epoch, and the loss with the indices of the samples:

    >>> import torch
    >>> from sciml.lm import ProgressiveSelfKDLoss
    >>> loss = ProgressiveSelfKDLoss(num_samples=100, num_classes=3, total_epochs=2)
    >>> index, logits, target = torch.tensor([7, 4]), torch.eye(2, 3), torch.tensor([0, 2])
    >>> for epoch in range(2):
    ...     loss.set_epoch(epoch)
    ...     value = loss(logits, target, index)  # then backward and the optimiser's step

    Parameters
    ----------
    num_samples, num_classes : int
        Size of the table of predictions.
    total_epochs : int
        Number of epochs T.
    alpha_T : float, default=0.8
        Weight of the earlier prediction in the last epoch (the paper's, tuned on CIFAR-100).
    storage_device : str or torch.device, default="cpu"
        Where the table lies, wherever the model is (the authors' code: CPU).
    dtype : torch.dtype, default=torch.float32
        Of the table; float16 halves it.
    path : path, default=None
        Folder for a table in files, mapped into memory, for sets whose predictions
        (4 ``num_samples * num_classes`` bytes, twice that in files) exceed it; see
        `PredictionStore`. With several processes each needs a folder of its own.

    Notes
    -----
    In train mode a forward stores the prediction; in eval mode it does not. The state dict holds
    epoch and predictions, so that a resumed run equals one that was not interrupted. With
    torch.distributed predictions and indices are gathered, every process stores them all.

    References
    ----------
    .. [1] Kim et al., arXiv:2006.12000.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        total_epochs: int,
        *,
        alpha_T: float = 0.8,
        storage_device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(total_epochs, alpha_T)
        check_integer("num_samples", num_samples, 1)
        check_integer("num_classes", num_classes, 2)
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.predictions = PredictionStore(
            num_samples, {"probability": (num_classes, dtype)}, device=storage_device, path=path
        )

    def forward(self, logits: Tensor, target: Tensor, index: Tensor | None = None) -> Tensor:
        """Mean loss of a batch, whose predictions are stored for the next epoch.

        Parameters
        ----------
        logits : Tensor of shape (n, num_classes)
            Scores of the batch.
        target : LongTensor of shape (n,)
            Labels.
        index : LongTensor of shape (n,)
            Numbers of the samples in the training set, in [0, num_samples). A data set has to
            return them: ``(x, y, index)``.

        Returns
        -------
        Tensor
            A scalar.

        Raises
        ------
        TypeError
            If `index` or `target` is not integer.
        ValueError
            If `index` is missing or out of range, shapes disagree, labels are no classes or
            logits are not finite.
        """
        _check_classification(logits, target)
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits must have {self.num_classes} columns as num_classes, got {logits.shape[1]}"
            )
        index = _checked_index(index, len(logits), self.num_samples)
        fields, seen = self.predictions.read(index.to(logits.device))
        previous = fields["probability"]
        if not bool(seen.all()):
            labels = F.one_hot(target.long(), self.num_classes).to(previous)
            previous = torch.where(seen[:, None], previous, labels)
        loss = _soft_cross_entropy(logits, target, previous, self.alpha, "mean")
        if self.training:
            probability = logits.detach().float().softmax(1)
            rows, probability = gather_rows(index.to(logits.device), probability)
            self.predictions.write(rows, probability=probability)
        return loss


def top_k_predictions(top_k: int) -> RowReduction:
    """Make a row reduction to the most probable tokens: their probabilities, then their numbers.

    Parameters
    ----------
    top_k : int
        How many.

    Returns
    -------
    callable
        For `reduce_rows`; values of shape (n, 2 top_k), without a gradient.
    """

    def reduction(logits: Tensor) -> tuple[Tensor, Any]:
        values, tokens = logits.topk(top_k)
        probability = (values - logits.logsumexp(-1, keepdim=True)).exp()
        return torch.cat([probability, tokens.to(logits)], 1), lambda _: torch.zeros_like(logits)

    return reduction


def pskd_token_loss(
    logits: Logits,
    labels: Tensor,
    probability: Tensor,
    tokens: Tensor,
    alpha: float,
    *,
    shift: bool = True,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross entropy of tokens to a mixture of label and earlier top-k prediction.

    The earlier prediction has the given probabilities on k tokens, what is missing to one is spread
    evenly over all others (an approximation of ours; the paper has no language models).

    Parameters
    ----------
    logits : Tensor of shape (batch, n_tokens, vocabulary_size) or HiddenLogits
        Scores of the next tokens.
    labels : LongTensor of shape (batch, n_tokens)
        -100 where nothing is to be predicted.
    probability : Tensor of shape (batch, n_tokens, k)
        Earlier probabilities of k different tokens, for row t of the logits; constants.
    tokens : LongTensor of shape (batch, n_tokens, k)
        Their numbers. Tokens of probability 0 in a row that sums to one need not differ.
    alpha : float
        Weight of the earlier prediction, in [0, 1].
    shift : bool, default=True
        Whether row t predicts label t + 1.
    reduction : {"mean", "sum", "none"}, default="mean"
        Over the tokens that have a label.
    num_items_in_batch : int or Tensor, default=None
        Divides the sum instead of the number of labels, see `reduce_tokens`.
    chunk_size : int, default=None
        Rows a chunk, see `reduce_rows`.

    Returns
    -------
    Tensor
        A scalar, or of shape (batch, n_tokens) with "none".

    Raises
    ------
    TypeError, ValueError, IndexError
        If shapes disagree, labels are no tokens, or `alpha` is outside [0, 1].
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_interval("alpha", alpha, 0, 1)
    labels, mask = supervised_labels(logits, labels, shift=shift)
    _check_top_k(labels, probability, tokens, vocabulary_size(logits))
    soft = _top_k_cross_entropy(alpha)
    sides = (labels, probability.detach(), tokens)
    if reduction == "none":
        return reduce_rows(soft, logits, *sides, mask=mask, chunk_size=chunk_size).squeeze(-1)
    weights = token_weights(mask, reduction, num_items_in_batch, torch.float64)
    total, _ = sum_rows(soft, logits, *sides, weights=weights, mask=mask, chunk_size=chunk_size)
    return total


class ProgressiveSelfKDTokenLoss(_ProgressiveLoss):
    """PS-KD for a language model: keeps the top-k prediction of every training token.

    Our extension of the paper's classifiers to next-token prediction: sample i of the training set
    has rows ``i * max_length ...`` in the table, one for each position of the logits.

    Parameters
    ----------
    num_samples, max_length : int
        Number of sequences and the largest number of tokens of one.
    total_epochs : int
        Number of epochs.
    top_k : int, default=8
        Tokens kept of a prediction; the rest is spread evenly. k numbers of float16 and int32 take
        6 k bytes a token, twice that in files.
    alpha_T : float, default=0.8
        Weight in the last epoch (the paper's for images; for tokens it is not known).
    path : path, default=None
        Folder for a table in files, see `PredictionStore`.

    References
    ----------
    .. [1] Kim et al., arXiv:2006.12000.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import ProgressiveSelfKDTokenLoss
    >>> loss = ProgressiveSelfKDTokenLoss(num_samples=10, max_length=6, total_epochs=2, top_k=2)
    >>> logits, labels = torch.zeros(1, 6, 4), torch.tensor([[1, 2, 3, 0, -100, -100]])
    >>> float(loss(logits, labels, index=torch.tensor([3])))  # log 4
    1.386...
    """

    def __init__(
        self,
        num_samples: int,
        max_length: int,
        total_epochs: int,
        *,
        top_k: int = 8,
        alpha_T: float = 0.8,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(total_epochs, alpha_T)
        check_integer("num_samples", num_samples, 1)
        check_integer("max_length", max_length, 1)
        check_integer("top_k", top_k, 1)
        self.num_samples = num_samples
        self.max_length = max_length
        self.top_k = top_k
        self.predictions = PredictionStore(
            num_samples * max_length,
            {"probability": (top_k, torch.float16), "token": (top_k, torch.int32)},
            path=path,
        )

    def forward(
        self,
        logits: Logits,
        labels: Tensor,
        index: Tensor | None = None,
        *,
        shift: bool = True,
        num_items_in_batch: int | Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Mean loss over the labelled tokens; their predictions are stored for the next epoch.

        Parameters
        ----------
        logits : Tensor of shape (batch, n_tokens, vocabulary_size) or HiddenLogits
            Scores of the next tokens.
        labels : LongTensor of shape (batch, n_tokens)
            -100 where nothing is to be predicted. Sequences are padded on the right, so that a
            token keeps its position from epoch to epoch.
        index : LongTensor of shape (batch,)
            Numbers of the sequences in the training set.
        shift, num_items_in_batch, chunk_size
            As for `pskd_token_loss`.

        Returns
        -------
        Tensor
            A scalar.

        Raises
        ------
        TypeError, ValueError, IndexError
            If `index` is missing or out of range, sequences are longer than `max_length`, shapes
            disagree or labels are no tokens.
        """
        next_labels, mask = supervised_labels(logits, labels, shift=shift)
        if labels.dim() != 2 or labels.shape[1] > self.max_length:
            raise ValueError(
                f"labels must have shape (batch, n_tokens <= max_length={self.max_length}), "
                f"got {tuple(labels.shape)}"
            )
        n_vocabulary = vocabulary_size(logits)
        if n_vocabulary <= self.top_k:
            raise ValueError(
                f"top_k must be less than the vocabulary of {n_vocabulary}, got {self.top_k}"
            )
        index = _checked_index(index, len(labels), self.num_samples).to(labels.device)
        rows = index[:, None] * self.max_length + torch.arange(
            labels.shape[1], device=labels.device
        )
        fields, seen = self.predictions.read(rows[mask])
        dtype = logits.dtype if isinstance(logits, Tensor) else logits.hidden.dtype
        dtype = torch.promote_types(dtype, torch.float32)
        probability = torch.zeros(*labels.shape, self.top_k, dtype=dtype, device=labels.device)
        tokens = torch.zeros(probability.shape, dtype=torch.long, device=labels.device)
        # A token not seen yet: all of the probability on its label.
        label_only = F.one_hot(torch.zeros_like(rows[mask]), self.top_k).to(dtype)
        probability[mask] = torch.where(seen[:, None], fields["probability"].to(dtype), label_only)
        tokens[mask] = torch.where(
            seen[:, None], fields["token"].long(), next_labels[mask][:, None]
        )
        soft = _top_k_cross_entropy(self.alpha, self.top_k if self.training else None)
        weights = token_weights(mask, "mean", num_items_in_batch, dtype)[..., None]
        if self.training:  # only the loss is summed, the new predictions come along
            weights = F.pad(weights, (0, 2 * self.top_k))
        sides = (next_labels, probability, tokens)
        loss, values = sum_rows(
            soft, logits, *sides, weights=weights, mask=mask, chunk_size=chunk_size
        )
        if self.training:
            _, new_probability, new_tokens = values[mask].split([1, self.top_k, self.top_k], -1)
            gathered = gather_rows(rows[mask], new_probability, new_tokens.int())
            self.predictions.write(gathered[0], probability=gathered[1], token=gathered[2])
        return loss


def _top_k_cross_entropy(alpha: float, top_k: int | None = None) -> RowReduction:
    """Cross entropy to label and top-k prediction; with `top_k` the model's own new one besides."""

    def reduction(
        logits: Tensor, labels: Tensor, probability: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Any]:
        n_others = logits.shape[-1] - tokens.shape[-1]
        logp = logits.log_softmax(-1)
        probability = probability.to(logp)
        rest = (1 - probability.sum(-1, keepdim=True)).clamp(min=0) / max(n_others, 1)
        # The stored numbers are rounded: what they sum to is made one.
        excess = probability / (probability.sum(-1, keepdim=True) + n_others * rest) - rest
        index = labels.clamp(min=0)[:, None]
        values = -(1 - alpha) * logp.gather(-1, index) - alpha * (
            (excess * logp.gather(-1, tokens)).sum(-1, keepdim=True)
            + rest * logp.sum(-1, keepdim=True)
        )
        if top_k is not None:
            new, _ = top_k_predictions(top_k)(logits)
            values = torch.cat([values, new], 1)

        def pullback(upstream: Tensor) -> Tensor:
            gradient = logp.exp_().sub_(alpha * rest)
            gradient.scatter_add_(-1, tokens, -alpha * excess)
            gradient.scatter_add_(-1, index, torch.full_like(rest, alpha - 1))
            return gradient.mul_(upstream[:, :1])

        return values, pullback

    return reduction


def _soft_cross_entropy(
    logits: Tensor, target: Tensor, previous: Tensor, alpha: float, reduction: str
) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    soft = previous.to(logits) * alpha
    soft.scatter_add_(1, target.long()[:, None], soft.new_full((len(soft), 1), 1 - alpha))
    return F.cross_entropy(logits, soft, reduction=reduction)


def _check_classification(logits: Any, target: Any) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a floating-point tensor, got {kind}")
    if logits.dim() != 2 or len(logits) == 0:
        raise ValueError(
            f"logits must have shape (n_samples, n_classes) with a sample, got "
            f"{tuple(logits.shape)}"
        )
    _check_integers("target", target)
    if target.shape != logits.shape[:1]:
        raise ValueError(f"target must have shape ({len(logits)},), got {tuple(target.shape)}")
    low, high = (int(x) for x in target.aminmax())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"target must hold classes from 0 to {logits.shape[1] - 1}, got {low} to {high}"
        )
    check_finite("logits", logits)


def _check_integers(name: str, value: Any) -> None:
    if (
        not isinstance(value, Tensor)
        or value.is_floating_point()
        or value.is_complex()
        or value.dtype == torch.bool
    ):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an integer tensor, got {kind}")


def _checked_index(index: Any, n: int, num_samples: int) -> Tensor:
    if index is None:
        raise ValueError(
            "index is needed: the number of each sample in the training set, under which its "
            "prediction is kept; let the data set return (x, y, index)"
        )
    _check_integers("index", index)
    if index.shape != (n,):
        raise ValueError(f"index must have shape ({n},), got {tuple(index.shape)}")
    low, high = (int(x) for x in index.aminmax())
    if low < 0 or high >= num_samples:
        raise ValueError(
            f"index must hold numbers from 0 to {num_samples - 1} = num_samples - 1, got {low} to "
            f"{high}"
        )
    result: Tensor = index.long()
    return result


def _check_top_k(labels: Tensor, probability: Tensor, tokens: Tensor, n_vocabulary: int) -> None:
    _check_integers("tokens", tokens)
    if tokens.shape[:-1] != labels.shape or probability.shape != tokens.shape:
        raise ValueError(
            f"probability and tokens must have shape {tuple(labels.shape)} + (k,), got "
            f"{tuple(probability.shape)} and {tuple(tokens.shape)}"
        )
    if not 0 < tokens.shape[-1] < n_vocabulary:
        raise ValueError(
            f"tokens must hold from 1 to {n_vocabulary - 1} tokens a row, got {tokens.shape[-1]}"
        )
    if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < n_vocabulary):
        raise ValueError(f"tokens must be in [0, {n_vocabulary}), got others")
    check_finite("probability", probability)
