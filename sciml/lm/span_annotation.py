"""Mark the spans of a response that decide it: segments, annotators, and masks over tokens.

An annotator reads a response cut into numbered segments, beside the reference answer, and says
which segments matter and, in a few words, why. Only the words reach a teacher's prompt; the
segments select the tokens on which it is compared with the student [1]_.

References
----------
.. [1] Wang et al., "TRACE: Distilling Where It Matters via Token-Routed Self On-Policy Alignment",
   arXiv:2605.10194, 2026.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sciml._check import check_choice, check_integer, check_interval

__all__ = [
    "LanguageModelAnnotator",
    "RuleAnnotator",
    "SpanAnnotation",
    "SpanAnnotator",
    "route_tokens",
    "split_sentences",
    "token_offsets",
]

KINDS = ("key", "error")


@dataclass(frozen=True)
class SpanAnnotation:
    """Segments of a response that matter.

    Attributes
    ----------
    segments : tuple of int
        Their numbers, from 0, the most important first. May be empty.
    kind : {"key", "error"}
        "key" marks what makes a right response right, "error" what makes a wrong one wrong.
    diagnostic_type : str
        Coarse reason, for example "missing case analysis". It must not give the answer away: it
        is shown to the teacher.
    """

    segments: tuple[int, ...]
    kind: str
    diagnostic_type: str

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        for number in self.segments:
            check_integer("segments", number, 0)


class SpanAnnotator(Protocol):
    """What ``TraceTrainer(annotator=...)`` takes: any callable like this."""

    def __call__(
        self, prompt: Any, segments: Sequence[Any], correct: bool, reference: Any
    ) -> SpanAnnotation:
        """Annotate a response.

        Parameters
        ----------
        prompt : str or LongTensor
        segments : sequence of str or of LongTensor
            The response in pieces.
        correct : bool
            What the verifier said.
        reference : object
            The reference answer of the prompt.

        Returns
        -------
        SpanAnnotation
            Of kind "key" if `correct`, else "error".
        """
        ...


def route_tokens(
    offsets: Sequence[tuple[int, int]] | Tensor,
    segments: Sequence[tuple[int, int]],
    kind: str,
    max_coverage: float = 0.25,
) -> tuple[Tensor, Tensor]:
    """Masks over the tokens of a response from marked ranges of its text.

    A token is marked if its range of characters overlaps a segment's. At most
    ``floor(max_coverage * n_tokens)`` tokens are: segments are taken whole and in their order,
    and one that does not fit any more is dropped.

    Parameters
    ----------
    offsets : sequence of (int, int), or LongTensor of shape (n_tokens, 2)
        Range of characters of each token, without the end; empty for special tokens, which are
        never marked.
    segments : sequence of (int, int)
        Marked ranges of characters, the most important first.
    kind : {"key", "error"}
        Which of the two masks they go to.
    max_coverage : float in [0, 1], default=0.25

    Returns
    -------
    key_mask, error_mask : BoolTensor of shape (n_tokens,)
        One of them is empty.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> from sciml.lm import route_tokens
    >>> offsets = [(0, 4), (4, 6), (6, 9), (9, 12)]
    >>> route_tokens(offsets, [(5, 6), (9, 12)], "key")[0]
    tensor([False,  True, False, False])
    """
    check_choice("kind", kind, KINDS)
    check_interval("max_coverage", max_coverage, 0, 1)
    ranges = torch.as_tensor(offsets, dtype=torch.long).reshape(-1, 2)
    if len(ranges) != len(offsets) or bool((ranges[:, 0] > ranges[:, 1]).any()):
        raise ValueError("offsets must be one (start, end) a token with start <= end")
    limit = math.floor(max_coverage * len(ranges) + 1e-9)
    mask = torch.zeros(len(ranges), dtype=torch.bool)
    for start, end in segments:
        check_integer("segments", start, 0)
        check_integer("segments", end, start)
        lows, highs = ranges[:, 0].clamp(min=start), ranges[:, 1].clamp(max=end)
        wider = mask | (lows < highs)
        if int(wider.sum()) <= limit:
            mask = wider
    empty = torch.zeros_like(mask)
    return (mask, empty) if kind == "key" else (empty, mask)


def split_sentences(text: str) -> list[tuple[int, int]]:
    r"""Ranges of the sentences and lines of a text, without the blanks around them.

    A sentence ends at ``.``, ``!`` or ``?`` before a blank, or at the end of a line. (How the
    paper segments is not published.)

    Parameters
    ----------
    text : str

    Returns
    -------
    list of (int, int)

    Examples
    --------
    >>> from sciml.lm import split_sentences
    >>> text = "Let x = 1.5. Then 2x = 3.\nDone"
    >>> [text[start:end] for start, end in split_sentences(text)]
    ['Let x = 1.5.', 'Then 2x = 3.', 'Done']
    """
    return [
        match.span() for match in re.finditer(r"[^\s](?:[^\n]*?[.!?](?=\s|$)|[^\n]*(?<=\S))", text)
    ]


def token_offsets(tokenizer: Any, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Range of characters that each token adds to the decoded text.

    Drawn tokens need not be those into which the tokenizer would cut the text, so it is decoded
    piece by piece instead of encoded again. Special tokens have an empty range; tokens that share
    a character each have its whole range.

    Parameters
    ----------
    tokenizer : object
        With ``decode(ids, skip_special_tokens=True)``.
    ids : sequence of int

    Returns
    -------
    list of (int, int)
        In ``tokenizer.decode(ids, skip_special_tokens=True)``.
    """
    ids = [int(i) for i in ids]

    def decoded(start: int, end: int) -> str:
        return str(tokenizer.decode(ids[start:end], skip_special_tokens=True))

    def ranges(context: int) -> list[tuple[int, int]]:
        result, total = [], 0
        for t in range(len(ids)):
            start = max(0, t - context)
            before, after = decoded(start, t), decoded(start, t + 1)
            begin, total = total, total + len(after) - len(before)
            if before.endswith("\ufffd") and decoded(t, t + 1):  # goes on with a broken character
                begin -= 1
            result.append((max(begin, 0), max(total, begin, 0)))
        return result

    found = ranges(context=8)
    text = decoded(0, len(ids))
    if ids and found[-1][1] != len(text):  # a decoder that looks further back: exact, but slow
        found = ranges(context=len(ids))
    return [(min(start, len(text)), min(end, len(text))) for start, end in found]


class RuleAnnotator:
    r"""Annotator of texts by rules, without a model.

    In a right response the segments that match a pattern are key, in their order. In a wrong one
    the error is the first segment that has a number the reference does not have (or the last
    segment, if there is none such): where the solution leaves the reference.

    Parameters
    ----------
    key_pattern : str, default=r"[=<>]|\b(so|thus|hence|therefore|because|if|case)\b"
        Regular expression, searched without regard to case.
    key_type, error_type : str
        Diagnostic types.

    Examples
    --------
    >>> from sciml.lm import RuleAnnotator
    >>> annotate = RuleAnnotator()
    >>> prompt, reference = "2 + 2 * 3?", "2 * 3 = 6; 8"
    >>> annotate(prompt, ["Products come first.", "2 + 6 = 8."], True, reference).segments
    (1,)
    >>> annotate(prompt, ["2 + 2 = 4.", "4 * 3 = 12."], False, reference).segments
    (0,)
    """

    def __init__(
        self,
        key_pattern: str = r"[=<>]|\b(so|thus|hence|therefore|because|if|case)\b",
        key_type: str = "decisive step",
        error_type: str = "wrong step",
    ) -> None:
        self.key_pattern = key_pattern
        self.key_type = key_type
        self.error_type = error_type

    def __call__(
        self, prompt: Any, segments: Sequence[str], correct: bool, reference: Any
    ) -> SpanAnnotation:
        """Annotate a response by the rules."""
        if correct:
            found = [
                i for i, s in enumerate(segments) if re.search(self.key_pattern, s, re.IGNORECASE)
            ]
            return SpanAnnotation(tuple(found), "key", self.key_type)
        known = set(_numbers(f"{prompt} {reference}"))
        strange = [i for i, s in enumerate(segments) if set(_numbers(s)) - known]
        if not strange and segments:
            strange = [len(segments) - 1]
        return SpanAnnotation(tuple(strange[:1]), "error", self.error_type)


class LanguageModelAnnotator:
    """Annotator that asks a language model, given as a callable from a prompt to its reply.

    The reply must hold a JSON object such as ``{"segments": [3, 1], "type": "sign error"}``. One
    that cannot be read, or names segments that do not exist or a type that is not among `types`,
    marks nothing (that response is then left to GRPO) and is counted.

    Parameters
    ----------
    complete : callable
        ``complete(prompt) -> reply``, for example a call to a server or to the policy itself.
    types : sequence of str
        Diagnostic types to choose from. The list is closed, so that a reply cannot carry the
        answer into the teacher's prompt. (The paper's list and wording are not published.)

    Attributes
    ----------
    n_unreadable_ : int
        Replies that marked nothing because they could not be read.
    """

    TYPES = (
        "arithmetic",
        "algebraic manipulation",
        "case analysis",
        "choice of method",
        "use of a given condition",
        "final answer",
    )

    def __init__(self, complete: Callable[[str], str], types: Sequence[str] = TYPES) -> None:
        if not callable(complete):
            raise TypeError(f"complete must be callable, got {complete!r}")
        if isinstance(types, str) or len(types) == 0:
            raise ValueError(f"types must be a sequence of one str or more, got {types!r}")
        self.complete = complete
        self.types = tuple(types)
        self.n_unreadable_ = 0

    def __call__(
        self, prompt: Any, segments: Sequence[str], correct: bool, reference: Any
    ) -> SpanAnnotation:
        """Ask the model."""
        kind = "key" if correct else "error"
        reply = self.complete(self.question(prompt, segments, correct, reference))
        read = self._read(reply, len(segments))
        if read is None:
            self.n_unreadable_ += 1
            return SpanAnnotation((), kind, "")
        return SpanAnnotation(read[0], kind, read[1])

    def question(self, prompt: Any, segments: Sequence[str], correct: bool, reference: Any) -> str:
        """What the model is asked."""
        task = (
            "The solution is correct. Name the few segments on which its correctness rests."
            if correct
            else "The solution is wrong. Name the few segments in which it goes wrong."
        )
        listed = "\n".join(f"[{i}] {segment}" for i, segment in enumerate(segments))
        return (
            f"Problem:\n{prompt}\n\nReference:\n{reference}\n\nSolution in numbered segments:\n"
            f"{listed}\n\n{task} Put the most important first and choose one type among "
            f"{', '.join(self.types)}. Reply with JSON only: "
            '{"segments": [numbers], "type": "one of the types"}'
        )

    def _read(self, reply: str, n_segments: int) -> tuple[tuple[int, ...], str] | None:
        found = re.search(r"\{[^{}]*\}", str(reply))
        try:
            parsed = json.loads(found[0]) if found else {}
        except json.JSONDecodeError:
            return None
        numbers, label = parsed.get("segments"), parsed.get("type")
        if label not in self.types or not isinstance(numbers, list):
            return None
        if any(type(i) is not int or not 0 <= i < n_segments for i in numbers):
            return None
        return tuple(numbers), str(label)


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", text)
