"""One line of the doctor's report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do about it."""

    name: str
    level: str
    """`OK`; `WARN`: a run can do without it, or may; `FAIL`: no run can."""
    detail: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.name}: {self.detail}" + (f"\n      to do: {self.fix}" if self.fix else "")


Check = Callable[[], Iterator[Finding]]
"""Looks at one thing and yields what it finds; an exception of its own is a finding, not the end."""


def run(checks: list[Check]) -> Iterator[Finding]:
    """Findings of all checks, as they come."""
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            yield Finding(check.__name__.replace("_", " "), FAIL, f"{type(error).__name__}: {error}")
