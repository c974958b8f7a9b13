"""Code that answers: run the response's program on the problem's tests, fenced (`wall`, `sandbox`).

What a program answers is compared here or in another process than its own (`statements`).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.rewards.code_tests import Calls, CodeTest, Prints, read_tests
from vespo_megatron.rewards.programs import last_program, prepare
from vespo_megatron.rewards.sandbox import Limits, run
from vespo_megatron.rewards.statements import hold
from vespo_megatron.rewards.wall import NONE, Wall, find_wall


def code_reward(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any],
    *,
    test_timeout: float = 4.0,
    memory_mb: int = 1024,
    max_tests: int = 20,
    partial: bool = False,
    allow_unsafe_code: bool = False,
) -> dict[str, float]:
    """1 when the last fenced block of the response passes the problem's tests (`partial`: the share it passes).

    Args:
        ground_truth: the tests, or JSON of them, in any form of `code_tests`.
        test_timeout: seconds for one test.
        memory_mb: memory of the program, in MiB.
        max_tests: tests to run at most, the first ones.
        allow_unsafe_code: run programs with all that this process may do where nothing fences them.

    Raises:
        UserError: tests of no known form; nothing here fences a program (`wall.find_wall`).
    """
    wall = choose_wall(allow_unsafe_code=allow_unsafe_code)
    tests = read_tests(ground_truth, f"ground truth of {data_source}")[:max_tests]
    program = last_program(solution_str)
    if program is None or not tests:
        return {"score": 0.0, "no_program": float(program is None)}
    passed = 0
    for test in tests:
        passed += _passes(test, program, Limits(test_timeout, memory_mb), wall)
        if passed == 0 and not partial:
            break
    share = passed / len(tests)
    return {"score": share if partial else float(share == 1.0), "passed": share, "no_program": 0.0}


def choose_wall(*, allow_unsafe_code: bool = False) -> Wall:
    """What programs are fenced by on this machine. Raises UserError where that is nothing, unless it is allowed."""
    try:
        return find_wall()
    except UserError:
        if not allow_unsafe_code:
            raise
        return NONE


def _passes(test: CodeTest, program: str, limits: Limits, wall: Wall) -> bool:
    if isinstance(test, Prints):
        ended = run(prepare(program, as_main=True), test.given, limits, wall)
        return ended.status == 0 and test.accepts(ended.printed)
    if isinstance(test, Calls):
        return _returns(test, prepare(program, as_main=False), limits, wall)
    return hold(test.statements, prepare(program, as_main=False), limits, wall)


def _returns(test: Calls, program: str, limits: Limits, wall: Wall) -> bool:
    mark = f"result of the call {secrets.token_hex(16)}: "
    call = (
        "\nimport json as _json, sys as _sys\n"
        f"_target = globals().get({test.name!r}) or getattr(Solution(), {test.name!r})\n"
        f"_answer = _target(*{list(test.arguments)!r})\n"
        f"_sys.stdout.write('\\n' + {mark!r} + _json.dumps(_answer, default=list))\n"
    )
    ended = run(program + call, "", limits, wall)
    _, found, answer = ended.printed.rpartition(mark)
    if ended.status != 0 or not found:
        return False
    try:
        return test.accepts(json.loads(answer))
    except json.JSONDecodeError:
        return False
