"""Code that answers: run the response's program on the problem's tests, fenced (`wall`, `sandbox`).

What a program answers is compared here or in another process than its own (`statements`).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.rewards.sandbox import Limits, run
from vespo_megatron.rewards.statements import hold
from vespo_megatron.rewards.wall import NONE, Wall, find_wall

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


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
        ground_truth: the tests, or JSON of them: `{"inputs": [...], "outputs": [...]}` for programs that read and
            print, with `"fn_name"` for functions (arguments and result as JSON), `{"asserts": [...]}` or a list of
            Python statements, or `{"test": "…"}`, statements in one text (HumanEval+ and MBPP+).
        test_timeout: seconds for one test.
        memory_mb: memory of the program, in MiB.
        max_tests: tests to run at most, the first ones.
        allow_unsafe_code: run programs with all that this process may do where nothing fences them.

    Raises:
        UserError: tests of no known form; nothing here fences a program (`wall.find_wall`).
    """
    wall = choose_wall(allow_unsafe_code=allow_unsafe_code)
    tests = _tests(ground_truth, data_source)[:max_tests]
    program = last_program(solution_str)
    if program is None or not tests:
        return {"score": 0.0, "no_program": float(program is None)}
    passed = 0
    for test in tests:
        passed += test(program, Limits(test_timeout, memory_mb), wall)
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


def last_program(text: str) -> str | None:
    """The last complete fenced block of a response; None without one."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else None


Test = Callable[[str, Limits, Wall], bool]
"""Whether a program passes."""


def _tests(ground_truth: Any, data_source: str) -> list[Test]:
    tests = ground_truth
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except json.JSONDecodeError:
            tests = {"test": tests}
    if isinstance(tests, list) and all(isinstance(line, str) for line in tests):
        tests = {"asserts": tests}
    if isinstance(tests, Mapping):
        if "inputs" in tests and "outputs" in tests:
            name = tests.get("fn_name")
            pairs = zip(tests["inputs"], tests["outputs"], strict=True)
            return [_calls(name, given, wanted) if name else _prints(given, wanted) for given, wanted in pairs]
        if "asserts" in tests:
            return [_holds(line) for line in tests["asserts"]]
        if isinstance(tests.get("test"), str):
            return [_holds(tests["test"])]
    raise UserError(
        f"{str(ground_truth)[:60]!r} are no tests",
        where=f"ground truth of {data_source}",
        expected='{"inputs", "outputs"}, with "fn_name" for functions, {"asserts"}, {"test"} or a list of statements',
    )


def _prints(given: Any, wanted: Any) -> Test:
    def test(program: str, limits: Limits, wall: Wall) -> bool:
        ended = run(program, _text(given), limits, wall)
        return ended.status == 0 and ended.printed.split() == _text(wanted).split()

    return test


def _calls(name: str, given: Any, wanted: Any) -> Test:
    """A call with `given` (a list of arguments); a result in a list of one is accepted, as the public sets have it."""
    mark = f"result of the call {secrets.token_hex(16)}: "
    call = (
        "\nimport json as _json, sys as _sys\n"
        f"_target = globals().get({name!r}) or getattr(Solution(), {name!r})\n"
        f"_sys.stdout.write('\\n' + {mark!r} + _json.dumps(_target(*_json.load(_sys.stdin))))\n"
    )

    def test(program: str, limits: Limits, wall: Wall) -> bool:
        ended = run(program + call, json.dumps(given), limits, wall)
        _, found, answer = ended.printed.rpartition(mark)
        if ended.status != 0 or not found:
            return False
        try:
            value = json.loads(answer)
        except json.JSONDecodeError:
            return False
        return value == wanted or [value] == wanted

    return test


def _holds(statements: str) -> Test:
    return lambda program, limits, wall: hold(statements, program, limits, wall)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else str(value)
