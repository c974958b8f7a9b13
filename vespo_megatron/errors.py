"""The one error style of the project: what is wrong, where, what was expected, what to do."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """A mistake or fault a person can act on; the command line prints it and exits with status 2.

    Args:
        what: the fact, with the offending value.
        where: the thing it was seen in (file, recipe key, sample id, rank, layer, server).
        expected: what would have been right.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", fix: str = "") -> None:
        self.what, self.where, self.expected, self.fix = what, where, expected, fix
        lines = [f"{where}: {what}" if where else what]
        if expected:
            lines.append(f"  expected: {expected}")
        if fix:
            lines.append(f"  to do: {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its fields, whatever a subclass adds: keyword-only arguments need a hand across processes."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[UserError], args: tuple[Any, ...], fields: dict[str, Any]) -> UserError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(fields)
    return error
