"""Is what a program printed, or a function returned, what was wanted? Numbers within rounding, all else exactly.

`code_judges` says whose answers are compared by which function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

TOLERANCE = 1e-6
"""Of numbers that are not whole: absolute below 1, relative above, as contests have it."""
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")
_WHOLE = re.compile(r"[-+]?\d+")
_LONGEST_NUMBER = 400
"""Characters; longer numbers are compared as text."""


def same_output(printed: str, wanted: str) -> bool:
    """Whether two texts have the same words in the same order; how blanks and lines part them is no matter."""
    ours, theirs = printed.split(), wanted.split()
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def same_lines(printed: str, wanted: str) -> bool:
    """Whether two texts have as many lines, each the same but for blanks around it or else the same decimals.

    Blanks and empty lines around the whole are no matter. Nothing is rounded, and words between numbers must stand in
    equal lines: LiveCodeBench's comparison (`grade_stdio` of its `lcb_runner/evaluation/testing_util.py`).
    """
    ours, theirs = (text.strip().split("\n") for text in (printed, wanted))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def same_value(value: Any, wanted: Any) -> bool:
    """Whether two JSON values are equal; `1` and `1.0` are."""
    if isinstance(wanted, list):
        return isinstance(value, list) and len(value) == len(wanted) and all(map(same_value, value, wanted))
    if isinstance(wanted, Mapping):
        return (
            isinstance(value, Mapping)
            and value.keys() == wanted.keys()
            and all(same_value(value[key], wanted[key]) for key in wanted)
        )
    if isinstance(wanted, float) and isinstance(value, (int, float)):
        return _close(float(value), wanted) if abs(value) < 1e300 else value == wanted
    return bool(value == wanted)


def _same_word(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    if max(len(ours), len(theirs)) > _LONGEST_NUMBER or not (_NUMBER.fullmatch(ours) and _NUMBER.fullmatch(theirs)):
        return False
    if _WHOLE.fullmatch(theirs):
        return Decimal(ours) == Decimal(theirs)
    return _close(float(ours), float(theirs))


def _same_line(ours: str, theirs: str) -> bool:
    if ours.strip() == theirs.strip():
        return True
    try:
        return [Decimal(word) for word in ours.split()] == [Decimal(word) for word in theirs.split()]
    except InvalidOperation:  # a word that is no number, or one that compares with none (sNaN)
        return False


def _close(ours: float, theirs: float) -> bool:
    return math.isclose(ours, theirs, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
