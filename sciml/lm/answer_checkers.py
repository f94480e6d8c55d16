"""Checkers that tell whether a response holds the right answer.

A checker is any function of (response, answer); `PassRateEstimator`, `PassRateWeighting` and
`TraceTrainer` take these or the user's own.
"""

import math
import re

__all__ = ["exact_match", "numeric_match"]


def exact_match(response: str, answer: str) -> bool:
    """Whether a response equals the answer, up to runs of white space and the ends.

    Examples
    --------
    >>> from sciml.lm import exact_match
    >>> exact_match(" 4  apples ", "4 apples"), exact_match("four", "4")
    (True, False)
    """
    return response.split() == answer.split()


# A sign behind a digit is an operation: "16-3" ends on 3.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def numeric_match(response: str, answer: str | float, tolerance: float = 1e-6) -> bool:
    """Whether the number that a response ends on equals the answer.

    In both texts it is the first number after the last ``####`` (the form of GSM8K) or, without
    that, the last number. Thousands separators, currency and percent signs do not matter.

    Parameters
    ----------
    response : str
    answer : str or float
    tolerance : float, default=1e-6
        Relative; absolute below 1.

    Returns
    -------
    bool
        False where the response has no number.

    Raises
    ------
    ValueError
        If the answer has no number.

    Examples
    --------
    >>> from sciml.lm import numeric_match
    >>> numeric_match("She has 9 * 2 = $18.00 a day.", "Janet sells 9 eggs. #### 18")
    True
    >>> numeric_match("#### 1,800 of 2", 18), numeric_match("no idea", 18)
    (False, False)
    """
    want = _last_number(answer) if isinstance(answer, str) else float(answer)
    if want is None or not math.isfinite(want):
        raise ValueError(f"answer must hold a finite number, got {answer!r}")
    got = _last_number(response)
    return got is not None and abs(got - want) <= tolerance * max(1.0, abs(want))


def _last_number(text: str) -> float | None:
    _, mark, rest = text.rpartition("####")
    found = _NUMBER.findall(rest)
    if not found:
        return None
    return float((found[0] if mark else found[-1]).replace(",", ""))
