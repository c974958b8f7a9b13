"""Can answers be judged here?"""

from __future__ import annotations

from collections.abc import Iterator

from vespo_megatron.doctor.findings import OK, WARN, Finding
from vespo_megatron.errors import UserError


def math() -> Iterator[Finding]:
    """Math-Verify knows that a half is a half."""
    from vespo_megatron.rewards.functions import math as score

    right = score("doctor", r"\boxed{\frac{2}{4}}", "0.5", {}) == 1.0
    yield Finding("math reward", OK if right else WARN, "judges" if right else "misjudges 2/4 against 0.5")


def code() -> Iterator[Finding]:
    """The sandbox runs a program."""
    from vespo_megatron.rewards.code import run

    try:
        status, printed = run("print(6 * 7)", "", 10.0, 512)
    except UserError as error:
        yield Finding("code reward", WARN, str(error).splitlines()[0], error.fix or "")
        return
    right = (status, printed) == (0, "42\n")
    yield Finding("code reward", OK if right else WARN, "runs programs" if right else f"status {status}")


CHECKS = [math, code]
