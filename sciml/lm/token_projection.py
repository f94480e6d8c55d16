"""Map a student's vocabulary onto a teacher's: the sparse projection of X-Token.

A student's token that the teacher's vocabulary has too is mapped to it; any other to the first
pieces that the teacher cuts it into, with weights that fall tenfold from piece to piece, so that
most of a token's mass goes where the teacher's next token would begin it [1]_. The result is a
matrix of a few entries a row, built once and frozen.

References
----------
.. [1] Sreenivas et al., "X-Token: Projection-Guided Cross-Tokenizer Knowledge Distillation",
   arXiv:2605.21699, 2026.
"""

import difflib
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sciml._check import check_integer, check_interval

from .token_bytes import special_token_ids, token_bytes

__all__ = ["TokenProjection", "build_token_projection", "coverage_report"]

SPECIAL_SIMILARITY, SPECIAL_WEIGHT = 0.3, 0.8  # least similarity of a pair, and its weight


@dataclass(frozen=True)
class TokenProjection:
    """Sparse matrix from a student's vocabulary to a teacher's, a few entries a row.

    Attributes
    ----------
    indices : LongTensor of shape (n_student_tokens, top_k)
        Teacher token ids, most weight first; -1 where a row has no further entry.
    weights : Tensor of shape (n_student_tokens, top_k)
        Not negative. A row sums to 1, or to 0 if the token is mapped to nothing.
    n_teacher_tokens : int
        Size of the teacher's vocabulary. Logits are often padded beyond it.

    Raises
    ------
    TypeError, ValueError
        If indices and weights do not fit, a token id is outside the teacher's vocabulary, or a row
        is not normalised.
    """

    indices: Tensor
    weights: Tensor
    n_teacher_tokens: int

    def __post_init__(self) -> None:
        indices, weights = self.indices, self.weights
        check_integer("n_teacher_tokens", self.n_teacher_tokens, 1)
        if indices.dtype != torch.long:
            raise TypeError(f"indices must be int64, got {indices.dtype}")
        if not weights.is_floating_point():
            raise TypeError(f"weights must be floating-point, not counts, got {weights.dtype}")
        if indices.dim() != 2 or indices.shape != weights.shape:
            raise ValueError(
                "indices and weights must have the same shape (n_student_tokens, top_k), got "
                f"{tuple(indices.shape)} and {tuple(weights.shape)}"
            )
        bad = (indices < -1) | (indices >= self.n_teacher_tokens)
        if bool(bad.any()):
            raise ValueError(
                f"indices must be -1 or in [0, {self.n_teacher_tokens}), got {int(indices[bad][0])}"
            )
        if not bool((weights >= 0).all()) or bool(((indices < 0) & (weights > 0)).any()):
            raise ValueError("weights must be 0 or larger, and 0 where indices are -1")
        total = weights.sum(1)
        wrong = ((total - 1).abs() > 1e-4) & (total != 0)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"weights of a row must sum to 1 or 0, got {float(total[row])} in row {row}"
            )

    @property
    def n_student_tokens(self) -> int:
        """Size of the student's vocabulary."""
        return len(self.indices)

    def matrix(
        self,
        *,
        columns: Tensor | None = None,
        n_rows: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The projection as a sparse CSR matrix.

        Parameters
        ----------
        columns : LongTensor of shape (n_columns,), optional
            Teacher tokens to keep, in their order; all by default.
        n_rows : int, optional
            Rows in all, the further ones empty: for student logits that are padded beyond the
            vocabulary.
        dtype : torch.dtype, optional
            Of the entries.

        Returns
        -------
        Tensor of shape (n_rows, n_columns)
            In the layout ``torch.sparse_csr``.
        """
        device = self.indices.device
        n_columns = self.n_teacher_tokens if columns is None else len(columns)
        kept = self.weights > 0
        column = self.indices.clamp(min=0)
        if columns is not None:
            place = torch.full((self.n_teacher_tokens,), -1, device=device)
            place[columns] = torch.arange(n_columns, device=device)
            column = place[column]
            kept = kept & (column >= 0)
        ends = kept.sum(1).cumsum(0)
        n_rows = self.n_student_tokens if n_rows is None else n_rows
        pointers = ends.new_zeros(n_rows + 1)
        pointers[1 : len(ends) + 1] = ends
        pointers[len(ends) + 1 :] = ends[-1]
        # Within a row CSR wants increasing columns.
        order = column.masked_fill(~kept, n_columns).argsort(dim=1, stable=True)
        kept = kept.gather(1, order)
        return _csr(
            pointers,
            column.gather(1, order)[kept],
            self.weights.gather(1, order)[kept].to(dtype or self.weights.dtype),
            (n_rows, n_columns),
        )

    def common_ids(self, threshold: float = 1.0) -> tuple[Tensor, Tensor]:
        """Pairs of tokens that stand for each other, each token in one pair at most.

        Parameters
        ----------
        threshold : float in (0, 1], default=1.0
            Least weight of a student token's best entry; 1 asks for its only entry. Where several
            student tokens have the same best entry, the one with most weight gets it, the lowest
            id among equals.

        Returns
        -------
        student_ids, teacher_ids : LongTensor of shape (n_pairs,)
            By increasing student id.
        """
        check_interval("threshold", threshold, 0, 1, closed="right")
        weight, place = self.weights.cpu().max(1)
        target = self.indices.cpu().gather(1, place[:, None]).squeeze(1)
        # Weights are float32 sums: 1 is 1 up to rounding.
        student = ((target >= 0) & (weight >= threshold - 1e-6)).nonzero().squeeze(1).numpy()
        teacher = target.numpy()[student]
        order = np.lexsort((student, -weight.numpy()[student], teacher))
        _, first = np.unique(teacher[order], return_index=True)
        chosen = np.sort(order[first])
        device = self.indices.device
        return (
            torch.from_numpy(student[chosen]).to(device),
            torch.from_numpy(teacher[chosen]).to(device),
        )

    def to(self, device: torch.device | str) -> "TokenProjection":
        """The same on another device."""
        return TokenProjection(
            self.indices.to(device), self.weights.to(device), self.n_teacher_tokens
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        tensors = {
            "indices": self.indices.cpu().contiguous(),
            "weights": self.weights.cpu().contiguous(),
        }
        save_file(tensors, path, {"n_teacher_tokens": str(self.n_teacher_tokens)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenProjection":
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            If the file lacks indices, weights or the size of the teacher's vocabulary.
        """
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            if not {"indices", "weights"} <= names or "n_teacher_tokens" not in metadata:
                raise ValueError(
                    "path must be a file with indices, weights and n_teacher_tokens, got "
                    f"{sorted(names)} and {sorted(metadata)} in {os.fspath(path)!r}"
                )
            return cls(
                file.get_tensor("indices"),
                file.get_tensor("weights"),
                int(metadata["n_teacher_tokens"]),
            )


def build_token_projection(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    top_k: int = 4,
    max_pieces: int = 4,
    decay: float = 0.1,
    bidirectional: bool = False,
    special_tokens: bool = False,
) -> TokenProjection:
    """Projection of a student's vocabulary onto a teacher's, from the tokenizers alone.

    A token that spells what a teacher's token spells is mapped to it with weight 1. Any other is
    cut by the teacher's tokenizer; its first pieces get the weights 1, `decay`, `decay` squared and
    so on, normalised, and a piece that comes twice gets both. The paper's rule, with the options
    of its code.

    Parameters
    ----------
    student_tokenizer, teacher_tokenizer : objects
        With ``get_vocab`` and ``__call__`` as tokenizers of transformers have them.
    top_k : int, default=4
        Entries to keep of a row, the paper's.
    max_pieces : int, default=4
        Pieces to keep of a token, the paper's.
    decay : float in (0, 1], default=0.1
        The paper's.
    bidirectional : bool, default=False
        Whether pieces of the teacher's tokens under the student's tokenizer are added too, as the
        paper's code can.
    special_tokens : bool, default=False
        Whether special tokens are mapped to similarly named ones.

    Returns
    -------
    TokenProjection

    Raises
    ------
    TypeError, ValueError
        If an option does not fit.

    Notes
    -----
    Tokens are compared, and cut, as the bytes that they spell (`token_bytes`): "Ġthe" is "▁the",
    and a SentencePiece token keeps the space that its ``decode`` drops. Bytes that are no text of
    their own, parts of a character, are only mapped to the same bytes. The code's slack weight
    (0.2 on an arbitrary last column) is left out.

    References
    ----------
    .. [1] Sreenivas et al., arXiv:2605.21699, 2026.
    """
    check_integer("top_k", top_k, 1)
    check_integer("max_pieces", max_pieces, 1)
    check_interval("decay", decay, 0, 1, closed="right")
    student, teacher = token_bytes(student_tokenizer), token_bytes(teacher_tokenizer)
    same: dict[bytes, int] = {}
    for index, spelled in enumerate(teacher):
        if spelled:
            same.setdefault(spelled, index)
    exact = np.array([same.get(spelled, -1) if spelled else -1 for spelled in student])
    powers = decay ** np.arange(max_pieces)
    entries = _pieces(student, np.flatnonzero(exact < 0), teacher_tokenizer, len(teacher), powers)
    if bidirectional:
        back = _pieces(teacher, np.arange(len(teacher)), student_tokenizer, len(student), powers)
        entries = [*entries, *((s, t, w) for t, s, w in back)]
    if special_tokens:
        entries += _similar_special_tokens(student_tokenizer, teacher_tokenizer, top_k)
    entries = [entry for entry in entries if exact[entry[0]] < 0]
    entries += [(s, t, 1.0) for s, t in enumerate(exact.tolist()) if t >= 0]
    indices, weights = _rows(entries, len(student), len(teacher), top_k)
    return TokenProjection(indices, weights, len(teacher))


def coverage_report(
    projection: TokenProjection, student_tokenizer: Any = None, *, threshold: float = 0.6
) -> dict[str, dict[str, float]]:
    """How much of the student's vocabulary the teacher's covers, by class of token.

    It helps to choose the loss: if tokens that matter, numerals say, lack a partner, take P-KL;
    else H-KL.

    Parameters
    ----------
    projection : TokenProjection
    student_tokenizer : object, optional
        Gives the classes "numeral" (two digits or more), "word" (letters only) and "other". All
        three may follow a space.
    threshold : float, default=0.6
        Of H-KL.

    Returns
    -------
    dict of str to dict
        For "all" and each class "n_tokens" and the fractions "exact" (in a pair of GOLD), "common"
        (in a pair of H-KL), "projected" (with an entry or more) and "pieces", the mean number of
        entries of projected tokens.

    Raises
    ------
    ValueError
        If the tokenizer has more tokens than the projection.
    """
    classes = {"all": np.arange(projection.n_student_tokens)}
    if student_tokenizer is not None:
        spelled = token_bytes(student_tokenizer)
        if len(spelled) > projection.n_student_tokens:
            raise ValueError(
                f"student_tokenizer must have at most the {projection.n_student_tokens} tokens of "
                f"the projection, got {len(spelled)}"
            )
        kinds = np.array([_kind(text) for text in spelled])
        classes |= {kind: np.flatnonzero(kinds == kind) for kind in ("numeral", "word", "other")}
    n_entries = (projection.weights > 0).sum(1).cpu().numpy()
    in_pair = []
    for least in (1.0, threshold):
        flags = np.zeros(projection.n_student_tokens)
        flags[projection.common_ids(least)[0].cpu().numpy()] = 1
        in_pair.append(flags)
    report = {}
    for name, ids in classes.items():
        n, projected = max(len(ids), 1), n_entries[ids] > 0
        report[name] = {
            "n_tokens": float(len(ids)),
            "exact": float(in_pair[0][ids].sum() / n),
            "common": float(in_pair[1][ids].sum() / n),
            "projected": float(projected.sum() / n),
            "pieces": float(n_entries[ids].sum() / max(projected.sum(), 1)),
        }
    return report


def _kind(spelled: bytes) -> str:
    text = spelled.decode(errors="replace").removeprefix(" ")
    if text.isdecimal() and len(text) > 1:
        return "numeral"
    return "word" if text.isalpha() else "other"


def _pieces(
    spelled: Sequence[bytes], ids: Iterable[int], tokenizer: Any, n_other: int, powers: np.ndarray
) -> list[tuple[int, int, float]]:
    """Entries (token, piece, weight) of tokens that the other tokenizer cuts."""
    texts, owners = [], []
    for i in ids:
        try:
            text = spelled[i].decode()
        except UnicodeDecodeError:
            continue
        if text:
            texts.append(text)
            owners.append(int(i))
    if not texts:
        return []
    ignored = special_token_ids(tokenizer)
    entries = []
    cuts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for owner, pieces in zip(owners, cuts, strict=True):
        if not pieces or any(piece in ignored or piece >= n_other for piece in pieces):
            continue
        weights = powers[: len(pieces)] / powers[: len(pieces)].sum()
        entries += [
            (owner, int(piece), float(w)) for piece, w in zip(pieces, weights, strict=False)
        ]
    return entries


def _similar_special_tokens(
    student: Any, teacher: Any, n_best: int
) -> list[tuple[int, int, float]]:
    """Entries between special tokens with similar names, weighted by the similarity."""
    names = []
    for tokenizer in (student, teacher):
        special = special_token_ids(tokenizer)
        names.append([(t, i) for t, i in tokenizer.get_vocab().items() if i in special])
    entries = []
    for ours, index in names[0]:
        scored = [(_similarity(ours, theirs), other) for theirs, other in names[1]]
        best = sorted((-score, other) for score, other in scored if score >= SPECIAL_SIMILARITY)
        entries += [(index, other, -SPECIAL_WEIGHT * score) for score, other in best[:n_best]]
    return entries


def _similarity(a: str, b: str) -> float:
    words = [{w for w in re.split(r"[<>|_]", name.lower()) if len(w) > 2} for name in (a, b)]
    union = words[0] | words[1]
    jaccard = len(words[0] & words[1]) / len(union) if union else 0.0
    return 0.6 * difflib.SequenceMatcher(None, a, b).ratio() + 0.4 * jaccard


def _rows(
    entries: Sequence[tuple[int, int, float]], n_student: int, n_teacher: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """Rows of the `top_k` largest entries, normalised; entries of one place are added."""
    indices = np.full((n_student, top_k), -1)
    weights = np.zeros((n_student, top_k))
    if entries:
        s, t, w = (np.array(column) for column in zip(*entries, strict=True))
        places, inverse = np.unique(s * n_teacher + t, return_inverse=True)
        w = np.bincount(inverse, weights=w)
        s, t = places // n_teacher, places % n_teacher
        order = np.lexsort((t, -w, s))
        s, t, w = s[order], t[order], w[order]
        rank = np.arange(len(s)) - np.searchsorted(s, s)
        kept = rank < top_k
        indices[s[kept], rank[kept]] = t[kept]
        weights[s[kept], rank[kept]] = w[kept]
        total = weights.sum(1, keepdims=True)
        weights = np.divide(weights, total, out=weights, where=total > 0)
    return torch.from_numpy(indices), torch.from_numpy(weights).float()


def _csr(pointers: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        # torch says on first use that the layout is in beta; products are all we need of it.
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
        return torch.sparse_csr_tensor(pointers, columns, values, shape, check_invariants=False)
