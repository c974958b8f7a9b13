"""A `config.json`'s keys, each checked as it is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vespo_megatron.errors import UserError


@dataclass(frozen=True)
class ConfigKeys:
    """The keys, and where they come from; every method raises `UserError` that names both."""

    config: Mapping[str, Any]
    where: str

    def error(self, name: str, value: Any, expected: str) -> UserError:
        """The error for a key that holds what it cannot."""
        return UserError(f"{name} is {value!r}", where=self.where, expected=expected)

    def refuse(self, condition: Any, what: str, expected: str) -> None:
        """Raise where the condition holds: a feature that this project does not train."""
        if condition:
            raise UserError(what, where=self.where, expected=expected)

    def count(self, name: str, *, minimum: int = 1) -> int:
        """A whole number that has to be there."""
        if self.config.get(name) is None:
            kind = self.config.get("model_type")
            raise UserError(f"lacks the key {name!r}", where=self.where, expected=f"a complete {kind} configuration")
        value = self.config[name]
        if not is_integer(value) or value < minimum:
            raise self.error(name, value, f"a whole number, at least {minimum}")
        return int(value)

    def count_or(self, name: str, default: int, *, minimum: int = 1) -> int:
        """A whole number, or the default where the key is absent or null."""
        return default if self.config.get(name) is None else self.count(name, minimum=minimum)

    def text_or(self, name: str, value: Any, default: str) -> str:
        """`value`, a text, or the default where it is None."""
        if value is not None and not (isinstance(value, str) and value):
            raise self.error(name, value, "a name")
        return value or default

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def positive(self, name: str, value: Any) -> float:
        """`value`, a positive number."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(name, value, "a positive number")
        return value

    def at_most(self, value: int, name: str, limit: float, of: str) -> None:
        """Raise where `value` is larger."""
        if value > limit:
            raise self.error(name, value, f"at most {of}, {limit}")


def is_integer(value: Any) -> bool:
    """Whether it is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)
