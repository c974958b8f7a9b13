"""Checks of what a server says: whatever is not of the expected kind is an error that shows the beginning of it."""

from __future__ import annotations

import reprlib
from typing import Any

from vespo_megatron.errors import UserError

_MAX_DIGITS = 18
"""Whole numbers of so many digits fit int64."""


class Check:
    """Raises `UserError` with one `where`."""

    def __init__(self, where: str) -> None:
        self.where = where

    def that(self, good: bool, what: str, expected: str) -> None:
        """Raise unless it is `good`."""
        if not good:
            raise UserError(what, where=self.where, expected=expected, fix="see the server's log")

    def equal(self, value: Any, expected: Any, name: str) -> None:
        """Raise unless the two are equal."""
        self.that(value == expected, f"{name} is {short(value)}", repr(expected))

    def whole_number(self, value: Any, name: str) -> int:
        """Versions travel as text (`"7"`), the rest as numbers."""
        text = value if isinstance(value, str) else str(value) if type(value) is int else ""
        good = text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
        self.that(good, f"{name} is {short(value)}", "a whole number that is not negative")
        return int(text)

    def text(self, value: Any, name: str) -> str:
        """A string."""
        self.that(isinstance(value, str), f"{name} is {short(value)}", "text")
        return str(value)

    def dictionary(self, value: Any, name: str) -> dict[str, Any]:
        """An object of JSON."""
        self.that(isinstance(value, dict), f"{name} is a {type(value).__name__}", "an object")
        return value

    def sequence(self, value: Any, name: str) -> list[Any]:
        """A list of JSON."""
        self.that(isinstance(value, list), f"{name} is a {type(value).__name__}", "a list")
        return value


def short(value: Any) -> str:
    """A server can send megabytes where a number belongs; a message shows the beginning."""
    return reprlib.repr(value)
