"""Code that answers: run the response's program on the problem's tests, fenced (`wall`, `sandbox`).

What a program answers is compared here or in another process than its own (`statements`).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.rewards.code_judges import Judge, judge_of
from vespo_megatron.rewards.code_tests import Calls, CodeTest, Prints, read_tests
from vespo_megatron.rewards.programs import last_program, prepare
from vespo_megatron.rewards.sandbox import Limits, run
from vespo_megatron.rewards.statements import hold
from vespo_megatron.rewards.wall import NONE, Wall, find_wall

_ANY_TYPE = "_plain = _answer"
_EXACT_TYPES = """
def _exactly(value):
    if isinstance(value, list):
        return [_exactly(each) for each in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _exactly(each) for key, each in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return value.item()
_plain = _exactly(list(_answer) if isinstance(_answer, tuple) else _answer)
"""
"""A scalar of NumPy's is its number; what else has no `item` is no answer."""


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
    judge: str | None = None,
    allow_unsafe_code: bool = False,
) -> dict[str, float]:
    """1 when the last fenced block of the response passes the problem's tests (`partial`: the share it passes).

    Args:
        ground_truth: the tests, or JSON of them, in any form of `code_tests`.
        test_timeout: seconds for one test.
        memory_mb: memory of the program, in MiB.
        max_tests: tests to run at most, the first ones.
        judge: of `code_judges.JUDGES`; None: the data source's.
        allow_unsafe_code: run programs with all that this process may do where nothing fences them.

    Raises:
        UserError: tests of no known form; no such judge; nothing here fences a program (`wall.find_wall`).
    """
    wall = choose_wall(allow_unsafe_code=allow_unsafe_code)
    compares = judge_of(data_source, judge)
    tests = read_tests(ground_truth, f"ground truth of {data_source}")[:max_tests]
    program = last_program(solution_str)
    if program is None or not tests:
        return {"score": 0.0, "no_program": float(program is None)}
    passed = 0
    for number, test in enumerate(tests, 1):
        passed += _passes(test, program, compares, Limits(test_timeout, memory_mb), wall)
        if passed < number and not partial and (passed == 0 or compares.ends_at_failure):
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


def _passes(test: CodeTest, program: str, judge: Judge, limits: Limits, wall: Wall) -> bool:
    source = prepare(program, as_main=isinstance(test, Prints), recursion_limit=judge.recursion_limit)
    if isinstance(test, Prints):
        ended = run(source, test.given, limits, wall)
        return ended.status == 0 and test.accepts(ended.printed, judge)
    if isinstance(test, Calls):
        return _returns(test, source, judge, limits, wall)
    return hold(test.statements, source, limits, wall)


def _returns(test: Calls, program: str, judge: Judge, limits: Limits, wall: Wall) -> bool:
    mark = f"result of the call {secrets.token_hex(16)}: "
    call = (
        "\nimport json as _json, sys as _sys\n"
        f"_target = globals().get({test.name!r}) or getattr(Solution(), {test.name!r})\n"
        f"_answer = _target(*{list(test.arguments)!r})\n"
        f"{_EXACT_TYPES if judge.exact_types else _ANY_TYPE}\n"
        f"_sys.stdout.write('\\n' + {mark!r} + _json.dumps(_plain, default=list))\n"
    )
    ended = run(program + call, "", limits, wall)
    _, found, answer = ended.printed.rpartition(mark)
    if ended.status != 0 or not found:
        return False
    try:
        return test.accepts(json.loads(answer), judge)
    except json.JSONDecodeError:
        return False
