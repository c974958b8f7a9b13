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
    """Something fences the programs of responses, and lets them run."""
    from vespo_megatron.rewards.sandbox import Limits, run
    from vespo_megatron.rewards.wall import find_wall

    try:
        wall = find_wall()
    except UserError as error:
        yield Finding("code reward", WARN, str(error).splitlines()[0], error.fix or "")
        return
    ended = run("print(6 * 7)", "", Limits(10.0, 512), wall)
    right = (ended.status, ended.printed) == (0, "42\n")
    yield Finding(
        "code reward",
        OK if right else WARN,
        f"runs programs in {wall.description}" if right else f"status {ended.status}",
    )


CHECKS = [math, code]
