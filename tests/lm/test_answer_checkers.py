import math

import pytest

from sciml.lm import exact_match, numeric_match


@pytest.mark.parametrize(
    ("response", "answer", "exact", "numeric"),
    [
        ("18", "18", True, True),
        (" 18\n", "18", True, True),
        ("So she has 9 * 2 = 18", "#### 18", False, True),
        ("9 * 2 = 18\n#### 18", "16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18", False, True),
        ("#### 18 of 20", "18", False, True),
        ("$1,234.50", "1234.5", False, True),
        ("-3", "3", False, False),
        ("-3", "#### -3", False, True),
        ("18.0000001", "18", False, True),
        ("18.01", "18", False, False),
        ("it is 16-13", "13", False, True),
        ("it is (-13)", "-13", False, True),
        ("18%", "18", False, True),
        ("1e3", "1000", False, True),
        ("it is .5", "0.5", False, True),
        ("I gave 18 and took 17", "18", False, False),
        ("eighteen", "18", False, False),
        ("####", "18", False, False),
    ],
)
def test_checkers(response, answer, exact, numeric):
    assert exact_match(response, answer) is exact
    assert numeric_match(response, answer) is numeric


def test_numeric_answers():
    assert numeric_match("about 0.3333", 1 / 3, tolerance=1e-3)
    assert not numeric_match("about 0.3333", 1 / 3)
    for answer in ("no number", math.nan, math.inf):
        with pytest.raises(ValueError, match="answer must hold a finite number"):
            numeric_match("18", answer)
