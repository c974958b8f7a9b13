"""Numbers on the command line: argparse types that refuse what means nothing, whichever command is asked."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """A number from `low` (`above`: which is refused itself) to `high`, for argparse."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):  # nan is in no range
            raise argparse.ArgumentTypeError(f"is {text}, expected a number {_bound(low, high, above=above)}")
        return value

    return read


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number from `low` to `high`, for argparse."""

    def read(text: str) -> int:
        value = _whole(text, low, high)
        if value is None:
            raise argparse.ArgumentTypeError(f"is {text}, expected a whole number {_bound(low, high)}")
        return value

    return read


def whole_numbers(low: int, high: int | None = None) -> Callable[[str], list[int]]:
    """Whole numbers from `low` to `high`, as in 1,2, for argparse."""

    def read(text: str) -> list[int]:
        parts = text.split(",")
        found = [value for part in parts if (value := _whole(part, low, high)) is not None]
        if len(found) < len(parts):
            raise argparse.ArgumentTypeError(f"is {text}, expected whole numbers {_bound(low, high)}, such as 1,2")
        return found

    return read


def _whole(text: str, low: int, high: int | None) -> int | None:
    try:
        value = int(text)
    except ValueError:
        return None
    return value if low <= value and (high is None or value <= high) else None


def _bound(low: float, high: float | None, *, above: bool = False) -> str:
    return f"{'above' if above else 'of at least'} {low:g}" + ("" if high is None else f" and at most {high:.10g}")
