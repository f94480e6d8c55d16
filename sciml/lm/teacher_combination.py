"""Weigh the losses of several teachers, by hand or by how well each does on its own tokens.

References
----------
.. [1] Sreenivas et al., "X-Token: Projection-Guided Cross-Tokenizer Knowledge Distillation",
   arXiv:2605.21699, 2026.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sciml._check import check_choice, check_integer, check_interval

from .token_reduction import supervised_labels
from .vocabulary_rows import Logits, entropy, label_logp, reduce_rows

__all__ = ["combine_teachers", "teacher_scores"]


def combine_teachers(
    losses: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    scores: Sequence[float] | Tensor | None = None,
    alpha: float = 1.0,
    select: bool = False,
    vocabulary_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Weighted sum of the losses of several teachers.

    Parameters
    ----------
    losses : sequence of scalar Tensors
        One a teacher, all of the same kind.
    weights : sequence of float, optional
        Static weights; 1 / n each by default. Not with `scores`.
    scores : sequence of float or Tensor of shape (n_teachers,), optional
        How good each teacher is here (`teacher_scores`): weights are ``softmax(alpha * scores)``,
        constant in the gradient.
    alpha : float, default=1.0
        Sharpness of the weights.
    select : bool, default=False
        Whether only the teacher with the largest score counts, the first among equals.
    vocabulary_sizes : sequence of int, optional
        Sizes of the teachers' vocabularies: losses are multiplied by ``log V / log(min V)``, as
        in the paper's code.

    Returns
    -------
    Tensor
        Scalar.

    Raises
    ------
    ValueError
        If lengths differ, there is no loss, or weights and scores are both given.

    References
    ----------
    .. [1] Sreenivas et al., arXiv:2605.21699, 2026.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import combine_teachers
    >>> losses = [torch.tensor(1.0), torch.tensor(3.0)]
    >>> combine_teachers(losses), combine_teachers(losses, scores=[-2.0, -0.5], select=True)
    (tensor(2.), tensor(3.))
    """
    if len(losses) == 0:
        raise ValueError("losses must hold one loss or more, got none")
    stacked = torch.stack(list(losses))
    if stacked.dim() != 1:
        raise ValueError(f"losses must be scalars, got shape {tuple(stacked.shape[1:])}")
    if weights is not None and scores is not None:
        raise ValueError("weights and scores exclude each other, got both")
    if select and scores is None:
        raise ValueError("select needs scores, got None")
    n = len(losses)
    for name, given in (
        ("weights", weights), ("scores", scores), ("vocabulary_sizes", vocabulary_sizes)
    ):  # fmt: skip
        if given is not None and len(given) != n:
            raise ValueError(f"{name} must have one entry a loss, {n}, got {len(given)}")
    check_interval("alpha", alpha, 0, math.inf, closed="left")
    if scores is not None:
        score = torch.as_tensor(scores, dtype=stacked.dtype, device=stacked.device).detach()
        if not bool(score.isfinite().all()):
            raise ValueError(f"scores must be finite, got {score.tolist()}")
        if select:
            return (
                stacked[int(score.argmax())]
                * _size_factors(vocabulary_sizes, n)[int(score.argmax())]
            )
        weight = (alpha * score).softmax(0)
    else:
        values = [1 / n] * n if weights is None else list(weights)
        for value in values:
            check_interval("weights", value, 0, math.inf, closed="left")
        weight = torch.tensor(values, dtype=stacked.dtype, device=stacked.device)
    factors = torch.tensor(_size_factors(vocabulary_sizes, n)).to(weight)
    return (stacked * weight * factors).sum()


def teacher_scores(
    teacher_logits: Logits,
    labels: Tensor,
    *,
    score: str = "cross_entropy",
    shift: bool = True,
    chunk_size: int | None = None,
) -> Tensor:
    """How sure, or how right, a teacher is on its own tokens of a batch: larger is better.

    Parameters
    ----------
    teacher_logits : Tensor of shape (batch, n_tokens, V_t) or HiddenLogits
    labels : LongTensor of shape (batch, n_tokens)
        The teacher's tokens of the text; -100 where none counts.
    score : {"cross_entropy", "entropy", "max_prob"}, default="cross_entropy"
        Mean over tokens of the label's log-probability, of minus the entropy, or of the largest
        probability.
    shift : bool, default=True
    chunk_size : int, optional

    Returns
    -------
    Tensor
        Scalar without a graph.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import teacher_scores
    >>> teacher_scores(torch.zeros(1, 2, 4), torch.tensor([[0, 1]]), score="max_prob")
    tensor(0.2500)
    """
    check_choice("score", score, ("cross_entropy", "entropy", "max_prob"))
    with torch.no_grad():
        labels, mask = supervised_labels(teacher_logits, labels, shift=shift)
        options: dict[str, Any] = {"mask": mask, "chunk_size": chunk_size}
        if score == "cross_entropy":
            values = reduce_rows(label_logp, teacher_logits, labels, **options)
        elif score == "entropy":
            values = -reduce_rows(entropy, teacher_logits, **options)
        else:
            values = reduce_rows(_largest_probability, teacher_logits, **options)
        return values.sum() / mask.sum().clamp(min=1)


def _largest_probability(z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return z.softmax(-1).amax(-1, keepdim=True), torch.zeros_like


def _size_factors(vocabulary_sizes: Sequence[int] | None, n: int) -> list[float]:
    if vocabulary_sizes is None:
        return [1.0] * n
    for size in vocabulary_sizes:
        check_integer("vocabulary_sizes", size, 2)
    return [math.log(size) / math.log(min(vocabulary_sizes)) for size in vocabulary_sizes]
