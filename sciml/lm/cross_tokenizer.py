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
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sciml._check import check_choice, check_integer, check_interval

from .aligned_chunks import chunk_sums, mean_log_probs
from .chunk_comparison import (
    Average,
    arithmetic_dtype,
    check_finite_chunks,
    checked_inputs,
    chunk_weights,
    compare_chunks,
    first_tensor,
    nothing_to_compare,
    sorted_l1,
    tokens_outside,
    with_parts,
)
from .token_projection import TokenProjection
from .token_reduction import IGNORE_INDEX, supervised_labels, token_weights
from .uld import uld_loss
from .vocabulary_rows import (
    HiddenLogits,
    Logits,
    finite_log_softmax,
    label_logp,
    reduce_rows,
    rowwise_dot,
    softmax_pullback,
    sum_rows,
    vocabulary_size,
)

__all__ = ["CrossTokenizerDistillationLoss", "hybrid_kl_loss", "projected_kl_loss"]

EPSILON = 1e-10  # added to projected masses by the paper's code


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
    student, teacher, chunks = checked_inputs(
        student_logits,
        teacher_logits,
        student_chunks,
        teacher_chunks,
        projection,
        shift,
        temperature,
    )
    if len(chunks) == 0:
        return nothing_to_compare(student)
    first = first_tensor(student)
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
    check_finite_chunks(each)
    return (
        each * chunk_weights(chunks, len(student_chunks), average, num_items_in_batch, dtype)
    ).sum()


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
    student, teacher, chunks = checked_inputs(
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
        return with_parts(nothing_to_compare(student), {}, ("common", "uncommon"), return_parts)
    options: dict[str, Any] = {"temperature": temperature, "chunk_size": chunk_size}
    with torch.no_grad():
        theirs = mean_log_probs(teacher, chunks.teacher, chunks.teacher_size, **options)
    compare = partial(
        _common_kl_and_sorted_l1,
        common=common,
        rest=tokens_outside(common, projection.n_student_tokens, vocabulary_size(teacher)),
        top_k=uncommon_topk,
    )
    loss, parts = compare_chunks(
        compare,
        mean_log_probs(student, chunks.student, chunks.student_size, **options),
        theirs,
        chunk_weights(
            chunks, len(student_chunks), average, num_items_in_batch, arithmetic_dtype(student)
        ),
        temperature,
        chunk_size,
    )
    factor = temperature**2
    named = {"common": parts[0] * factor, "uncommon": parts[1] * factor}
    return with_parts(loss * factor, named, (), return_parts)


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
            weights=token_weights(mask, dtype=arithmetic_dtype(student_logits)),
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
        return with_parts(loss, parts, (), return_parts)

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
    first = first_tensor(logits)
    best = first.new_full((vocabulary_size(logits),), -torch.inf, dtype=arithmetic_dtype(logits))

    def update(z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if len(z):
            torch.maximum(best, z.amax(0), out=best)
        return z[:, :1], torch.zeros_like

    with torch.no_grad():
        reduce_rows(update, logits, mask=chunk >= 0, chunk_size=chunk_size)
    return best.topk(n_columns).indices.sort().values


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
    l1, of_rest = sorted_l1(p_rest, log_q[:, rest[1]].exp(), n)
    gradient = torch.zeros_like(log_p)  # padding of the vocabulary has none
    gradient[:, common[0]] = -q
    gradient[:, rest[0]] = of_rest.mul_(p_rest)
    return kl + l1, torch.cat([kl, l1], dim=1), gradient


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


def _transpose(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|CSC|invariant)")
        return matrix.t().to_sparse_csr()
