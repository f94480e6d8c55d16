"""Distil a teacher with another tokenizer: P-KL, H-KL, GOLD and ULD.

Both models read the same text; its chunks (`align_spans`) say which rows of logits belong
together. *P-KL* projects the student's probabilities onto the teacher's vocabulary and compares
them there. *H-KL* compares log-probabilities of tokens that stand for each other, and of all
others only their sorted probabilities; *GOLD* is the same with exact matches only, and *ULD*
compares sorted probabilities alone. A student's numeral that the teacher splits into digits has no
exact match: GOLD then pushes it down, since the common tokens' share of the gradient lowers every
other logit, and nothing but P-KL tells "12" from "34" [1]_.

Losses take logits or `HiddenLogits`; with the latter no (batch, time, vocabulary) array exists.

References
----------
.. [1] Sreenivas et al., "X-Token: Projection-Guided Cross-Tokenizer Knowledge Distillation",
   arXiv:2605.21699, 2026.
.. [2] Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss
   for LLMs", arXiv:2402.12030, 2024.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sciml._check import check_choice, check_integer, check_interval

from .aligned_chunks import (
    AlignedChunks,
    aligned_chunks,
    chunk_sums,
    flat_rows,
    mean_log_probs,
    merged_log_probs,
)
from .token_projection import TokenProjection
from .token_reduction import IGNORE_INDEX, next_token_labels, supervised_labels, token_weights
from .vocabulary_rows import (
    HiddenLogits,
    Logits,
    entropy,
    finite_log_softmax,
    label_logp,
    reduce_rows,
    rowwise_dot,
    softmax_pullback,
    sum_rows,
    vocabulary_size,
)

__all__ = [
    "CrossTokenizerDistillationLoss",
    "combine_teachers",
    "hybrid_kl_loss",
    "hybrid_uld_loss",
    "projected_kl_loss",
    "teacher_scores",
    "uld_loss",
]

Average = Literal["chunk", "sequence"]
# What is compared of a chunk: from log-probabilities of both sides (n, V_s), (n, V_t) the loss
# (n, 1), its parts (n, k) and its gradient (n, V_s) with respect to the student's.
Comparison = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
EPSILON = 1e-10  # added to projected masses by the paper's code
SMALLEST = 1e-8  # probabilities below it count as it, in TRL


def projected_kl_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    student_chunks: Tensor,
    teacher_chunks: Tensor,
    projection: TokenProjection,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
    vocab_topk: int = 8192,
    shift: bool = True,
    average: Average = "chunk",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """KL divergence on the teacher's vocabulary, onto which the student is projected (P-KL).

    With ``p = softmax(z)`` of the student and the projection W, a chunk's student distribution is
    the mean of ``p W`` over its rows, renormalised; its teacher's log-probabilities are the mean of
    ``log_softmax``. Only the `vocab_topk` teacher tokens with the largest logits enter. Nothing is
    matched one to one, so that no token is without a teacher.

    Parameters
    ----------
    student_logits : Tensor of shape (batch, n_student, V_s) or HiddenLogits
    teacher_logits : Tensor of shape (batch, n_teacher, V_t) or HiddenLogits
        Columns beyond the projection's teacher vocabulary, padding, are cut off. Its gradient is
        not taken.
    student_chunks : LongTensor of shape (batch, n_student)
        Chunk of each token (`align_spans`); -1 for none.
    teacher_chunks : LongTensor of shape (batch, n_teacher)
    projection : TokenProjection
        On the device of the logits.
    direction : {"forward", "reverse"}, default="forward"
        "forward" is KL(teacher || student), the paper's.
    temperature : float, default=1.0
        Divides both logits; the loss is multiplied by its square.
    vocab_topk : int, default=8192
        The paper's.
    shift : bool, default=True
        Whether row t predicts token t + 1. A chunk with the first token of a sequence is left out.
    average : {"chunk", "sequence"}, default="chunk"
        Mean over all chunks of the batch, or over sequences of their mean.
    num_items_in_batch : int or Tensor, optional
        Chunks in all micro-batches of a step; "chunk" then divides by it.
    chunk_size : int, optional
        Rows of logits at a time.

    Returns
    -------
    Tensor
        Scalar. Without a chunk that has rows on both sides it is 0, in the graph, with a warning.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or the loss is not finite.

    Notes
    -----
    The (batch, time, V_t) projection of all rows is never formed: rows are projected by a sparse
    product with the columns that count and added up by chunk at once, and read a second time for
    the gradient. The `vocab_topk` columns are chosen among rows of chunks only, where the paper's
    code looks at padding too.

    References
    ----------
    .. [1] Sreenivas et al., arXiv:2605.21699, 2026.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import TokenProjection, projected_kl_loss
    >>> same = TokenProjection(torch.arange(2)[:, None], torch.ones(2, 1), 2)
    >>> student = torch.zeros(1, 1, 2, requires_grad=True)
    >>> teacher = torch.tensor([[[0.9, 0.1]]]).log()
    >>> chunk = torch.zeros(1, 1, dtype=torch.long)
    >>> loss = projected_kl_loss(student, teacher, chunk, chunk, same, shift=False)
    >>> loss.backward()
    >>> round(loss.item(), 4), student.grad
    (0.3681, tensor([[[-0.4000,  0.4000]]]))
    """
    check_choice("direction", direction, ("forward", "reverse"))
    check_integer("vocab_topk", vocab_topk, 1)
    student, teacher, chunks = _checked(
        student_logits,
        teacher_logits,
        student_chunks,
        teacher_chunks,
        projection,
        shift,
        temperature,
    )
    if len(chunks) == 0:
        return _nothing(student)
    first = _first(student)
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    columns = None
    if vocab_topk < projection.n_teacher_tokens:
        columns = _largest_columns(teacher, chunks.teacher, vocab_topk, chunk_size)
    weights = projection.matrix(columns=columns, n_rows=vocabulary_size(student), dtype=dtype)
    n_columns = weights.shape[1]
    project = partial(
        _projected, weights=weights, transposed=_transpose(weights), temperature=temperature
    )
    sums = chunk_sums(
        project, student, chunks.student, len(chunks), n_columns, chunk_size=chunk_size
    )
    with torch.no_grad():
        if columns is not None and isinstance(teacher, HiddenLogits):
            bias = None if teacher.bias is None else teacher.bias[columns]
            teacher, columns = HiddenLogits(teacher.hidden, teacher.weight[columns], bias), None
        log_q = chunk_sums(
            partial(_column_log_probs, columns=columns, temperature=temperature),
            teacher,
            chunks.teacher,
            len(chunks),
            n_columns,
            chunk_size=chunk_size,
        ).div_(chunks.teacher_size[:, None])
    log_q = log_q.to(dtype)
    p = sums / chunks.student_size[:, None]
    p = p / (p.sum(1, keepdim=True) + EPSILON)
    log_p = (p + EPSILON).log()
    if direction == "forward":
        each = rowwise_dot(log_q.exp(), log_q) - rowwise_dot(log_q.exp(), log_p)
    else:
        each = (p * (log_p - log_q)).sum(1, keepdim=True)
    each = each.squeeze(1) * temperature**2
    _check_finite(each)
    return (each * _weights(chunks, len(student_chunks), average, num_items_in_batch, dtype)).sum()


def hybrid_kl_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    student_chunks: Tensor,
    teacher_chunks: Tensor,
    projection: TokenProjection,
    *,
    threshold: float = 0.6,
    temperature: float = 1.0,
    uncommon_topk: int = 8192,
    shift: bool = True,
    average: Average = "chunk",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
    return_parts: bool = False,
) -> Any:
    """KL divergence on common tokens and L1 distance of the others' sorted probabilities (H-KL).

    Common tokens are the pairs ``projection.common_ids(threshold)``: 0.6 is the paper's H-KL, 1
    its GOLD. On means of log-probabilities over a chunk's rows, S of the student and Q of the
    teacher, the loss is the sum over pairs of ``exp(Q) (Q - S)``, not renormalised, and the L1
    distance of ``exp(S)`` and ``exp(Q)`` on other tokens, sorted, over as many as the smaller side
    has.

    Parameters
    ----------
    student_logits, teacher_logits, student_chunks, teacher_chunks, projection, temperature
        As in `projected_kl_loss`.
    threshold : float in (0, 1], default=0.6
        Least weight of a pair.
    uncommon_topk : int, default=8192
        Largest number of sorted probabilities.
    shift, average, num_items_in_batch, chunk_size
        As in `projected_kl_loss`.
    return_parts : bool, default=False
        Whether to return the means of the two terms, "common" and "uncommon", too.

    Returns
    -------
    loss : Tensor
        Scalar. Without a chunk it is 0, in the graph, with a warning.
    parts : dict of str to Tensor
        Where asked for; detached.

    Raises
    ------
    TypeError, ValueError
        As `projected_kl_loss`.

    See Also
    --------
    hybrid_uld_loss : GOLD as TRL computes it.

    Notes
    -----
    The gradient of the common term on an uncommon token's logit is its probability times the
    teacher's common mass: descent lowers it whatever the teacher says.

    References
    ----------
    .. [1] Sreenivas et al., arXiv:2605.21699, 2026.
    """
    check_integer("uncommon_topk", uncommon_topk, 1)
    student, teacher, chunks = _checked(
        student_logits,
        teacher_logits,
        student_chunks,
        teacher_chunks,
        projection,
        shift,
        temperature,
    )
    common = projection.common_ids(threshold)
    if len(chunks) == 0:
        return _with_parts(_nothing(student), {}, ("common", "uncommon"), return_parts)
    options: dict[str, Any] = {"temperature": temperature, "chunk_size": chunk_size}
    with torch.no_grad():
        theirs = mean_log_probs(teacher, chunks.teacher, chunks.teacher_size, **options)
    compare = partial(
        _common_kl_and_sorted_l1,
        common=common,
        rest=_complements(common, projection.n_student_tokens, vocabulary_size(teacher)),
        top_k=uncommon_topk,
    )
    loss, parts = _compare(
        compare,
        mean_log_probs(student, chunks.student, chunks.student_size, **options),
        theirs,
        _weights(chunks, len(student_chunks), average, num_items_in_batch, _dtype(student)),
        temperature,
        chunk_size,
    )
    factor = temperature**2
    named = {"common": parts[0] * factor, "uncommon": parts[1] * factor}
    return _with_parts(loss * factor, named, (), return_parts)


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
            rest=_complements(common, n_student, n_teacher),
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
    return _with_parts(loss, named, ("matched", "unmatched"), return_parts)


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


class CrossTokenizerDistillationLoss(nn.Module):
    """Cross-tokenizer distillation beside the cross entropy of the student.

    ``kl_weight * KD + ce_weight * CE``, or, with dynamic scaling, ``|CE| / |KD| * KD + CE`` with
    the factor held constant in the gradient (1 if KD is 0), so that both pull alike.

    Parameters
    ----------
    mode : {"p-kl", "h-kl", "gold", "uld"}, default="p-kl"
        `projected_kl_loss`; `hybrid_kl_loss` with threshold 0.6 or 1; `uld_loss`, averaged over
        chunks as the others are.
    projection : TokenProjection, optional
        Needed by all but "uld". Moves with the module.
    temperature : float, default=1.0
    kl_weight : float, default=1.0
        With `ce_weight`, of the fixed scaling; not used by the dynamic one.
    ce_weight : float, default=0.1
    dynamic_scaling : bool, default=True
        The default of the paper's code.
    vocab_topk : int, default=8192
        Of P-KL, and the number of sorted probabilities of H-KL and GOLD.
    chunk_size : int, optional
        Rows of logits at a time.

    Raises
    ------
    ValueError
        If an option does not fit.

    References
    ----------
    .. [1] Sreenivas et al., arXiv:2605.21699, 2026.

    Examples
    --------
    >>> import torch
    >>> from sciml.lm import CrossTokenizerDistillationLoss, TokenProjection
    >>> same = TokenProjection(torch.arange(5)[:, None], torch.ones(5, 1), 5)
    >>> objective = CrossTokenizerDistillationLoss("p-kl", same, dynamic_scaling=False)
    >>> ids = torch.tensor([[0, 3, 1]])
    >>> logits = torch.zeros(1, 3, 5, requires_grad=True)
    >>> chunks = torch.arange(3)[None]
    >>> loss = objective(logits, torch.zeros(1, 3, 5), chunks, chunks, labels=ids)
    >>> round(loss.item(), 4)  # uniform both: no divergence, and a tenth of log 5
    0.1609
    """

    indices: Tensor | None
    weights: Tensor | None

    def __init__(
        self,
        mode: str = "p-kl",
        projection: TokenProjection | None = None,
        *,
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        ce_weight: float = 0.1,
        dynamic_scaling: bool = True,
        vocab_topk: int = 8192,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("p-kl", "h-kl", "gold", "uld"))
        if mode != "uld" and projection is None:
            raise ValueError(f"projection must be given for mode {mode!r}, got None")
        check_interval("temperature", temperature, 0, math.inf, closed="neither")
        check_interval("kl_weight", kl_weight, 0, math.inf, closed="left")
        check_interval("ce_weight", ce_weight, 0, math.inf, closed="left")
        check_integer("vocab_topk", vocab_topk, 1)
        self.mode = mode
        self.temperature = float(temperature)
        self.kl_weight = kl_weight
        self.ce_weight = ce_weight
        self.dynamic_scaling = dynamic_scaling
        self.vocab_topk = vocab_topk
        self.chunk_size = chunk_size
        self._n_teacher_tokens = None if projection is None else projection.n_teacher_tokens
        indices, weights = (None, None) if projection is None else (
            projection.indices, projection.weights
        )  # fmt: skip
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    def extra_repr(self) -> str:
        """Options shown by ``print``."""
        scaling = (
            "dynamic_scaling=True"
            if self.dynamic_scaling
            else f"kl_weight={self.kl_weight}, ce_weight={self.ce_weight}"
        )
        return f"{self.mode!r}, temperature={self.temperature}, {scaling}"

    def forward(
        self,
        student_logits: Logits,
        teacher_logits: Logits,
        student_chunks: Tensor,
        teacher_chunks: Tensor,
        *,
        labels: Tensor,
        teacher_labels: Tensor | None = None,
        shift: bool = True,
        return_parts: bool = False,
    ) -> Any:
        """Loss of a batch.

        Parameters
        ----------
        student_logits : Tensor of shape (batch, n_student, V_s) or HiddenLogits
        teacher_logits : Tensor of shape (batch, n_teacher, V_t) or HiddenLogits
        student_chunks, teacher_chunks : LongTensor of shape (batch, n_tokens)
            As in `projected_kl_loss`.
        labels : LongTensor of shape (batch, n_student)
            The student's tokens, -100 where none counts: not in the cross entropy, and no chunk
            with such a token in the distillation.
        teacher_labels : LongTensor of shape (batch, n_teacher), optional
            The teacher's; needed by "uld".
        shift : bool, default=True
            Whether row t predicts token t + 1.
        return_parts : bool, default=False
            Whether to return "kd", "ce" and "scale", the factor of KD, too.

        Returns
        -------
        loss : Tensor
            Scalar.
        parts : dict of str to Tensor
            Where asked for; detached.
        """
        student_chunks, teacher_chunks = _labelled_chunks(
            student_chunks, teacher_chunks, labels, teacher_labels
        )
        kd = self._distillation(
            student_logits,
            teacher_logits,
            student_chunks,
            teacher_chunks,
            labels,
            teacher_labels,
            shift,
        )
        targets, mask = supervised_labels(student_logits, labels, shift=shift)
        total, _ = sum_rows(
            label_logp,
            student_logits,
            targets,
            weights=token_weights(mask, dtype=_dtype(student_logits)),
            mask=mask,
            chunk_size=self.chunk_size,
        )
        ce = -total
        if self.dynamic_scaling:
            size = kd.detach().abs()
            scale = torch.where(size > 0, ce.detach().abs() / torch.where(size > 0, size, 1), 1)
            loss = scale * kd + ce
        else:
            scale = torch.as_tensor(self.kl_weight, dtype=kd.dtype, device=kd.device)
            loss = scale * kd + self.ce_weight * ce
        parts = {"kd": kd.detach(), "ce": ce.detach(), "scale": scale}
        return _with_parts(loss, parts, (), return_parts)

    def _distillation(
        self,
        student_logits: Logits,
        teacher_logits: Logits,
        student_chunks: Tensor,
        teacher_chunks: Tensor,
        labels: Tensor,
        teacher_labels: Tensor | None,
        shift: bool,
    ) -> Tensor:
        inputs = (student_logits, teacher_logits, student_chunks, teacher_chunks)
        options: dict[str, Any] = {
            "temperature": self.temperature, "shift": shift, "chunk_size": self.chunk_size
        }  # fmt: skip
        if self.mode == "uld":
            return uld_loss(
                *inputs,
                student_ids=labels,
                teacher_ids=teacher_labels,
                average="chunk",
                **options,
            )
        assert self.indices is not None
        assert self.weights is not None
        assert self._n_teacher_tokens is not None
        projection = TokenProjection(self.indices, self.weights.float(), self._n_teacher_tokens)
        if self.mode == "p-kl":
            return projected_kl_loss(*inputs, projection, vocab_topk=self.vocab_topk, **options)
        return cast(
            Tensor,
            hybrid_kl_loss(
                *inputs,
                projection,
                threshold=0.6 if self.mode == "h-kl" else 1.0,
                uncommon_topk=self.vocab_topk,
                **options,
            ),
        )


# Rows of logits.


def _projected(
    z: Tensor, *, weights: Tensor, transposed: Tensor, temperature: float
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Probabilities of each row, projected."""
    p = torch.softmax(z / temperature, dim=-1)

    def pullback(upstream: Tensor) -> Tensor:
        return softmax_pullback(p, (weights @ upstream.T).T).div_(temperature)

    return (transposed @ p.T).T, pullback


def _column_log_probs(
    z: Tensor, *, columns: Tensor | None, temperature: float
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Log-probabilities within some columns; of the teacher, without a gradient."""
    chosen = z if columns is None else z[:, columns]
    return finite_log_softmax(chosen / temperature), lambda upstream: torch.zeros_like(z)


def _largest_columns(
    logits: Logits, chunk: Tensor, n_columns: int, chunk_size: int | None
) -> Tensor:
    """The columns whose largest logit over all rows is largest, in increasing order."""
    first = _first(logits)
    best = first.new_full((vocabulary_size(logits),), -torch.inf, dtype=_dtype(logits))

    def update(z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if len(z):
            torch.maximum(best, z.amax(0), out=best)
        return z[:, :1], torch.zeros_like

    with torch.no_grad():
        reduce_rows(update, logits, mask=chunk >= 0, chunk_size=chunk_size)
    return best.topk(n_columns).indices.sort().values


def _largest_probability(z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return z.softmax(-1).amax(-1, keepdim=True), torch.zeros_like


# Chunks, one row each: log-probabilities are log_softmax(logits / temperature) + offset.


def _compare(
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
    _check_finite(values[:, 0])
    of_offset = (weights * values[:, 1] * (offset - offset.detach())).sum()
    return loss + of_offset, weights @ values[:, 2:]


def _sorted_l1(p: Tensor, q: Tensor, n: int, padded: bool = False) -> tuple[Tensor, Tensor]:
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


def _sorted_l1_comparison(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ULD: all tokens sorted."""
    p = log_p.exp()
    distance, gradient = _sorted_l1(p, log_q.exp(), max(p.shape[1], log_q.shape[1]))
    return distance, distance.expand(-1, 2), gradient.mul_(p)


def _common_kl_and_sorted_l1(
    log_p: Tensor,
    log_q: Tensor,
    *,
    common: tuple[Tensor, Tensor],
    rest: tuple[Tensor, Tensor],
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """H-KL."""
    theirs = log_q[:, common[1]].clamp_(min=-1e30)
    q = theirs.exp()
    kl = rowwise_dot(q, theirs - log_p[:, common[0]])
    p_rest = log_p[:, rest[0]].exp()
    n = min(len(rest[0]), len(rest[1]), top_k)
    l1, of_rest = _sorted_l1(p_rest, log_q[:, rest[1]].exp(), n)
    gradient = torch.zeros_like(log_p)  # padding of the vocabulary has none
    gradient[:, common[0]] = -q
    gradient[:, rest[0]] = of_rest.mul_(p_rest)
    return kl + l1, torch.cat([kl, l1], dim=1), gradient


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
    l1, of_rest = _sorted_l1(p_rest, q_rest, n)
    gradient = torch.empty_like(log_p)
    gradient[:, common[0]] = of_common.mul_(above).mul_(weights[0])
    gradient[:, rest[0]] = of_rest.mul_(p_rest).mul_(weights[1])
    return weights[0] * jsd + weights[1] * l1, torch.cat([jsd, l1], dim=1), gradient


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
    student, teacher, chunks = _checked(
        student_logits, teacher_logits, *both_chunks, projection, shift, temperature
    )
    if len(chunks) == 0:
        return _nothing(student), None
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
    return _compare(
        comparison(vocabulary_size(student), vocabulary_size(teacher)),
        merged[0],
        merged[1],
        _weights(chunks, len(both_chunks[0]), average, num_items_in_batch, _dtype(student)),
        temperature,
        chunk_size,
    )


# Arguments.


def _checked(
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
        if _first(logits).shape[:-1] != chunks.shape:
            raise ValueError(
                f"{name}_chunks must have the leading shape of {name}_logits, "
                f"{tuple(_first(logits).shape[:-1])}, got {tuple(chunks.shape)}"
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


def _labelled_chunks(
    student_chunks: Tensor,
    teacher_chunks: Tensor,
    labels: Tensor,
    teacher_labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Chunks all of whose tokens have a label."""
    result = (student_chunks, teacher_chunks)
    for chunks, given, name in (
        (student_chunks, labels, "labels"), (teacher_chunks, teacher_labels, "teacher_labels")
    ):  # fmt: skip
        if given is None:
            continue
        if given.shape != chunks.shape:
            raise ValueError(
                f"{name} must have the shape of its chunks, {tuple(chunks.shape)}, "
                f"got {tuple(given.shape)}"
            )
        n = max(student_chunks.shape[1], teacher_chunks.shape[1]) + 1
        # Column 0 stands for tokens without a chunk.
        without = torch.zeros(len(chunks), n, dtype=torch.bool, device=chunks.device)
        hidden = torch.where(given == IGNORE_INDEX, chunks + 1, 0)
        without.scatter_(1, hidden, True)
        result = tuple(torch.where(without.gather(1, side + 1), -1, side) for side in result)  # type: ignore[assignment]
    return result


def _weights(
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


def _complements(
    common: tuple[Tensor, Tensor], n_student: int, n_teacher: int
) -> tuple[Tensor, Tensor]:
    """Tokens of either side that are in no pair."""
    result = []
    for ids, n in zip(common, (n_student, n_teacher), strict=True):
        alone = torch.ones(n, dtype=torch.bool, device=ids.device)
        alone[ids] = False
        result.append(alone.nonzero().squeeze(1))
    return result[0], result[1]


def _transpose(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|CSC|invariant)")
        return matrix.t().to_sparse_csr()


def _size_factors(vocabulary_sizes: Sequence[int] | None, n: int) -> list[float]:
    if vocabulary_sizes is None:
        return [1.0] * n
    for size in vocabulary_sizes:
        check_integer("vocabulary_sizes", size, 2)
    return [math.log(size) / math.log(min(vocabulary_sizes)) for size in vocabulary_sizes]


def _nothing(student: Logits) -> Tensor:
    """A zero in the graph, with a warning."""
    warnings.warn(
        "no chunk of the batch has rows on both sides, so the distillation loss is 0: do both "
        "sides read the same text?",
        stacklevel=3,
    )
    first = _first(student)
    return first[:0].sum().to(_dtype(student))


def _check_finite(values: Tensor) -> None:
    bad = ~values.detach().isfinite()
    if bool(bad.any()):
        raise ValueError(
            "student_logits and teacher_logits must give a finite loss, got "
            f"{values[bad][0].item()} in {int(bad.sum())} of {len(values)} chunks"
        )


def _first(logits: Logits) -> Tensor:
    return logits.hidden if isinstance(logits, HiddenLogits) else logits


def _dtype(logits: Logits) -> torch.dtype:
    return torch.float64 if _first(logits).dtype == torch.float64 else torch.float32


def _with_parts(
    loss: Tensor, parts: dict[str, Tensor], zero: Sequence[str], return_parts: bool
) -> Any:
    if not return_parts:
        return loss
    return loss, parts or {name: loss.detach() for name in zero}
