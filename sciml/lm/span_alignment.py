"""Align two tokenizations of one text: which tokens of one spell what which of the other spell.

A *chunk* is a shortest run of tokens on both sides with the same text: "201" on one side and "2",
"0", "1" on the other are one chunk. On clean text chunks end where tokens of both sides end at
the same byte, which is found in linear time. Where the texts differ (a token more at the front, a
normaliser that changes case) the tokens themselves are aligned by dynamic programming, as in
X-Token [1]_.

References
----------
.. [1] Sreenivas et al., "X-Token: Projection-Guided Cross-Tokenizer Knowledge Distillation",
   arXiv:2605.21699, 2026.
.. [2] Needleman and Wunsch, "A general method applicable to the search for similarities in the
   amino acid sequence of two proteins", Journal of Molecular Biology 48, 1970.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sciml._check import check_choice, check_integer

from .token_bytes import token_bytes, token_text_bytes

__all__ = ["AlignedTexts", "align_offsets", "align_spans", "align_texts"]

EQUAL, UNEQUAL, GAP, COMBINED = 3.0, -3.0, -1.5, 1.5  # scores of the paper's code
ANCHOR_LENGTH, ANCHORS_ABOVE = 3, 64  # tokens in an anchor, and input length from which they help

Token = str | bytes
Pair = tuple[int, int, int, int]  # student tokens [a, b) with teacher tokens [c, d)


def align_spans(
    student_tokens: Sequence[Token],
    teacher_tokens: Sequence[Token],
    *,
    method: str = "offsets",
    max_combination: int = 4,
    anchors: bool = True,
) -> tuple[Tensor, Tensor]:
    """Number the chunks of two tokenizations of one text.

    Parameters
    ----------
    student_tokens, teacher_tokens : sequences of str or bytes
        Tokens as strings of the vocabulary, whose markers of spaces are understood
        (`token_text_bytes`), or as the bytes they spell (`token_bytes`). Empty ones, which
        special tokens are, belong to no chunk. A single space at the start of one side only, as
        SentencePiece adds it, is ignored.
    method : {"offsets", "dp"}, default="offsets"
        "offsets" closes a chunk where tokens of both sides end at the same byte; chunks whose
        texts differ are left out. "dp" aligns the tokens by Needleman-Wunsch with the scores of
        the paper's code: +3 for equal tokens, -3 for unequal ones, -1.5 for a gap, +1.5 k for one
        token that spells k on the other side. Runs of unequal tokens and gaps with the same text
        are then merged, and split where both sides have a token's end. On clean text both methods
        give the same chunks.
    max_combination : int, default=4
        Largest k of "dp".
    anchors : bool, default=True
        Whether "dp" aligns long inputs between runs of three tokens that occur once on both
        sides, instead of as a whole.

    Returns
    -------
    student_chunks : LongTensor of shape (n_student_tokens,)
        Numbers of chunks from 0, increasing; -1 for a token without a chunk.
    teacher_chunks : LongTensor of shape (n_teacher_tokens,)

    See Also
    --------
    align_offsets : the same from the offsets of a fast tokenizer.
    align_texts : tokenize a batch of texts twice and align.

    Notes
    -----
    Departures from the paper's code, as it is described: an underscore is no space; merging has
    no exception for the last fifth of the text.

    References
    ----------
    .. [1] Sreenivas et al., arXiv:2605.21699, 2026.

    Examples
    --------
    >>> from sciml.lm import align_spans
    >>> align_spans(["201", "Ġhund", "reds"], ["2", "0", "1", "▁hundreds"])
    (tensor([0, 1, 1]), tensor([0, 0, 0, 1]))
    """
    check_choice("method", method, ("offsets", "dp"))
    check_integer("max_combination", max_combination, 1)
    ours, theirs = (
        [token if isinstance(token, bytes) else token_text_bytes(token) for token in tokens]
        for tokens in (student_tokens, teacher_tokens)
    )
    _drop_leading_space(ours, theirs)
    student, teacher = ([token for token in tokens if token] for tokens in (ours, theirs))
    if method == "offsets":
        student_chunks, teacher_chunks = _common_ends(_ends(student), _ends(teacher))
        if b"".join(student) != b"".join(teacher):
            _keep_equal(student, teacher, student_chunks, teacher_chunks)
    else:
        path = _alignment_path(student, teacher, max_combination, anchors)
        chunks = _merge(student, teacher, path)
        student_chunks, teacher_chunks = _numbers(chunks, len(student), len(teacher))
    return _with_empty(ours, student_chunks), _with_empty(theirs, teacher_chunks)


def align_offsets(student_offsets: Any, teacher_offsets: Any) -> tuple[Tensor, Tensor]:
    """Number the chunks of two tokenizations from the places of their tokens in the text.

    Parameters
    ----------
    student_offsets, teacher_offsets : array of shape (n_tokens, 2)
        Start and end of each token, in characters or bytes of the same text, as fast tokenizers
        give with ``return_offsets_mapping=True``. Tokens of no length belong to no chunk.

    Returns
    -------
    student_chunks, teacher_chunks : LongTensor of shape (n_tokens,)
        As of `align_spans`.

    Raises
    ------
    ValueError
        If an array has another shape, or ends that decrease.

    Examples
    --------
    >>> from sciml.lm import align_offsets
    >>> align_offsets([(0, 3), (3, 8)], [(0, 1), (1, 2), (2, 3), (3, 8)])
    (tensor([0, 1]), tensor([0, 0, 0, 1]))
    """
    offsets, ends = [], []
    for name, given in (("student_offsets", student_offsets), ("teacher_offsets", teacher_offsets)):
        array = np.asarray(given, dtype=np.int64).reshape(len(given), -1)
        if array.shape[1:] != (2,) and len(array):
            raise ValueError(f"{name} must have shape (n_tokens, 2), got {array.shape}")
        array = array.reshape(-1, 2)
        filled = array[:, 1] > array[:, 0]
        if (np.diff(array[filled, 1]) < 0).any():
            raise ValueError(f"{name} must have ends that do not decrease, got some that do")
        offsets.append(filled)
        ends.append(array[filled, 1])
    result = []
    for filled, chunks in zip(offsets, _common_ends(*ends), strict=True):
        whole = np.full(len(filled), -1)
        whole[filled] = chunks
        result.append(torch.from_numpy(whole))
    return result[0], result[1]


@dataclass(frozen=True)
class AlignedTexts:
    """Texts as two tokenizers read them, padded on the right, and their common chunks.

    Attributes
    ----------
    student_ids, teacher_ids : LongTensor of shape (batch, n_tokens)
        Padded with 0.
    student_mask, teacher_mask : LongTensor of shape (batch, n_tokens)
        Attention masks.
    student_chunks, teacher_chunks : LongTensor of shape (batch, n_tokens)
        As of `align_spans`, for each text from 0; -1 in the padding.
    """

    student_ids: Tensor
    teacher_ids: Tensor
    student_mask: Tensor
    teacher_mask: Tensor
    student_chunks: Tensor
    teacher_chunks: Tensor

    def to(self, device: torch.device | str) -> "AlignedTexts":
        """The same on another device."""
        return AlignedTexts(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def align_texts(
    texts: Sequence[str],
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    method: str = "offsets",
    max_length: int | None = None,
    add_special_tokens: bool = True,
) -> AlignedTexts:
    """Tokenize texts twice and align the tokens.

    Parameters
    ----------
    texts : sequence of str
    student_tokenizer, teacher_tokenizer : objects
        With ``get_vocab`` and ``__call__`` as tokenizers of transformers have them.
    method : {"offsets", "dp"}, default="offsets"
        As of `align_spans`.
    max_length : int, optional
        Tokens to keep of each side; chunks that are cut are left out.
    add_special_tokens : bool, default=True
        Whether tokenizers add theirs. A loss reads a chunk at the rows that predict it, so the
        first chunk counts only if a token comes before it on both sides.

    Returns
    -------
    AlignedTexts

    Raises
    ------
    TypeError
        If `texts` is a string.
    ValueError
        If it is empty.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts must be a sequence of str, got the str {texts!r}")
    if len(texts) == 0:
        raise ValueError("texts must hold one text or more, got none")
    check_choice("method", method, ("offsets", "dp"))
    if max_length is not None:
        check_integer("max_length", max_length, 1)
    ids, spelled = [], []
    for tokenizer in (student_tokenizer, teacher_tokenizer):
        encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        ids.append([list(row) for row in encoded])
        spelled.append(token_bytes(tokenizer))
    chunks: tuple[list[Tensor], list[Tensor]] = ([], [])
    for ours, theirs in zip(*ids, strict=True):
        aligned = align_spans(
            [spelled[0][i] for i in ours], [spelled[1][i] for i in theirs], method=method
        )
        for side, other, result in zip(aligned, aligned[::-1], chunks, strict=True):
            if max_length is not None:
                # A chunk that was cut on either side is none.
                cut = torch.cat([side[max_length:], other[max_length:]])
                side = side[:max_length].masked_fill(torch.isin(side[:max_length], cut), -1)
            result.append(side)
    rows = [[torch.tensor(row[:max_length], dtype=torch.long) for row in side] for side in ids]
    padded = [torch.nn.utils.rnn.pad_sequence(side, batch_first=True) for side in rows]
    masks = [
        torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in side], batch_first=True)
        for side in rows
    ]
    numbers = [
        torch.nn.utils.rnn.pad_sequence(side, batch_first=True, padding_value=-1) for side in chunks
    ]
    return AlignedTexts(*padded, *masks, *numbers)


def _drop_leading_space(student: list[bytes], teacher: list[bytes]) -> None:
    first, other = (
        next((i for i, token in enumerate(tokens) if token), None) for tokens in (student, teacher)
    )
    if first is None or other is None:
        return
    ours, theirs = student[first], teacher[other]
    if ours.startswith(b" ") and not theirs.startswith(b" "):
        student[first] = ours[1:]
    elif theirs.startswith(b" ") and not ours.startswith(b" "):
        teacher[other] = theirs[1:]


def _ends(tokens: Sequence[bytes]) -> np.ndarray:
    return np.cumsum([len(token) for token in tokens], dtype=np.int64)


def _common_ends(student: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chunks closed where both sides have a token's end; tokens after the last are in none."""
    common = np.intersect1d(student, teacher)
    chunks = []
    for ends in (student, teacher):
        number = np.searchsorted(common, ends)
        number[number == len(common)] = -1
        chunks.append(number)
    return chunks[0], chunks[1]


def _keep_equal(
    student: Sequence[bytes],
    teacher: Sequence[bytes],
    student_chunks: np.ndarray,
    teacher_chunks: np.ndarray,
) -> None:
    """Take chunks whose texts differ out, in place, and number the others anew."""
    n_chunks = max(student_chunks.max(initial=-1), teacher_chunks.max(initial=-1)) + 1
    texts = []
    for tokens, chunks in ((student, student_chunks), (teacher, teacher_chunks)):
        parts: list[list[bytes]] = [[] for _ in range(n_chunks)]
        for token, chunk in zip(tokens, chunks, strict=True):
            if chunk >= 0:
                parts[chunk].append(token)
        texts.append([b"".join(part) for part in parts])
    equal = np.array([ours == theirs for ours, theirs in zip(*texts, strict=True)], dtype=bool)
    # The last entry is what -1 stands for.
    number = np.append(np.where(equal, np.cumsum(equal) - 1, -1), -1)
    student_chunks[:] = number[student_chunks]
    teacher_chunks[:] = number[teacher_chunks]


def _with_empty(tokens: Sequence[bytes], chunks: np.ndarray) -> Tensor:
    whole = np.full(len(tokens), -1)
    whole[[len(token) > 0 for token in tokens]] = chunks
    return torch.from_numpy(whole)


def _alignment_path(
    student: Sequence[bytes], teacher: Sequence[bytes], max_combination: int, anchors: bool
) -> list[Pair]:
    """Pairs that cover both sides in order, by dynamic programming between anchors."""
    fixed: list[tuple[int, int]] = []
    if anchors and max(len(student), len(teacher)) > ANCHORS_ABOVE:
        fixed = _anchors(student, teacher)
    path: list[Pair] = []
    a = c = 0
    for b, d in [*fixed, (len(student), len(teacher))]:
        part = _needleman_wunsch(student[a:b], teacher[c:d], max_combination)
        path += [(a + i, a + j, c + k, c + m) for i, j, k, m in part]
        if b < len(student) and d < len(teacher):
            path.append((b, b + 1, d, d + 1))
        a, c = b + 1, d + 1
    return path


def _anchors(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[tuple[int, int]]:
    """Where runs of three tokens start that occur once on both sides, as many as are in order."""
    places = []
    for tokens in (student, teacher):
        runs = [
            tuple(tokens[i : i + ANCHOR_LENGTH]) for i in range(len(tokens) - ANCHOR_LENGTH + 1)
        ]
        counts = Counter(runs)
        places.append({run: i for i, run in enumerate(runs) if counts[run] == 1})
    pairs = [(i, places[1][run]) for run, i in places[0].items() if run in places[1]]
    return _longest_increasing(pairs)


def _longest_increasing(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Longest subsequence with increasing second entries (patience sorting)."""
    tops: list[int] = []  # last entry of the best subsequence of each length
    indices: list[int] = []
    previous: list[int] = []
    for index, (_, value) in enumerate(pairs):
        length = int(np.searchsorted(tops, value))
        previous.append(indices[length - 1] if length else -1)
        tops[length : length + 1] = [value]
        indices[length : length + 1] = [index]
    chain, index = [], indices[-1] if indices else -1
    while index >= 0:
        chain.append(pairs[index])
        index = previous[index]
    return chain[::-1]


def _needleman_wunsch(
    student: Sequence[bytes], teacher: Sequence[bytes], max_combination: int
) -> list[Pair]:
    """Best path through the table of both sides; ties go to the first move tried."""
    n, m = len(student), len(teacher)
    scores = [[GAP * (i + j) if i * j == 0 else 0.0 for j in range(m + 1)] for i in range(n + 1)]
    moves = [[(1, 0) if j == 0 else (0, 1) for j in range(m + 1)] for _ in range(n + 1)]
    joined = {  # what k tokens that end at each place spell
        k: (_joined(student, k), _joined(teacher, k)) for k in range(2, max_combination + 1)
    }
    for i in range(1, n + 1):
        token, above, row = student[i - 1], scores[i - 1], scores[i]
        for j in range(1, m + 1):
            other = teacher[j - 1]
            best, move = above[j - 1] + (EQUAL if token == other else UNEQUAL), (1, 1)
            if above[j] + GAP > best:
                best, move = above[j] + GAP, (1, 0)
            if row[j - 1] + GAP > best:
                best, move = row[j - 1] + GAP, (0, 1)
            for k, (_, spelled) in joined.items():
                if k <= j and token == spelled[j] and above[j - k] + COMBINED * k > best:
                    best, move = above[j - k] + COMBINED * k, (1, k)
            for k, (spelled, _) in joined.items():
                if k <= i and other == spelled[i] and scores[i - k][j - 1] + COMBINED * k > best:
                    best, move = scores[i - k][j - 1] + COMBINED * k, (k, 1)
            row[j], moves[i][j] = best, move
    path: list[Pair] = []
    i, j = n, m
    while i > 0 or j > 0:
        down, right = moves[i][j]
        path.append((i - down, i, j - right, j))
        i, j = i - down, j - right
    return path[::-1]


def _joined(tokens: Sequence[bytes], k: int) -> list[bytes]:
    return [b"".join(tokens[i - k : i]) if i >= k else b"" for i in range(len(tokens) + 1)]


def _merge(student: Sequence[bytes], teacher: Sequence[bytes], path: Sequence[Pair]) -> list[Pair]:
    """Chunks of a path: from each pair on, as many as make the texts of both sides equal.

    What cannot be made equal is left out pair by pair. What can is split where both sides have a
    token's end, as the path may have missed one.
    """
    chunks: list[Pair] = []
    start = 0
    while start < len(path):
        ours = theirs = b""  # what one side has spelled beyond the other
        for end in range(start, len(path)):
            a, b, c, d = path[end]
            ours += b"".join(student[a:b])
            theirs += b"".join(teacher[c:d])
            shared = min(len(ours), len(theirs))
            if ours[:shared] != theirs[:shared]:
                break
            ours, theirs = ours[shared:], theirs[shared:]
            if not ours and not theirs:
                chunks += _split(student, teacher, (path[start][0], b, path[start][2], d))
                start = end
                break
        start += 1
    return chunks


def _split(student: Sequence[bytes], teacher: Sequence[bytes], chunk: Pair) -> list[Pair]:
    a, b, c, d = chunk
    ours = dict(
        zip(accumulate(len(token) for token in student[a:b]), range(a + 1, b + 1), strict=True)
    )
    theirs = dict(
        zip(accumulate(len(token) for token in teacher[c:d]), range(c + 1, d + 1), strict=True)
    )
    ends = [(a, c), *((ours[end], theirs[end]) for end in ours if end in theirs)]
    return [(i, j, k, m) for (i, k), (j, m) in pairwise(ends)]


def _numbers(
    chunks: Sequence[Pair], n_student: int, n_teacher: int
) -> tuple[np.ndarray, np.ndarray]:
    student, teacher = np.full(n_student, -1), np.full(n_teacher, -1)
    for number, (a, b, c, d) in enumerate(chunks):
        student[a:b] = number
        teacher[c:d] = number
    return student, teacher
