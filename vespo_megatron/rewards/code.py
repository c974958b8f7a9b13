"""Code that answers: run the response's program on the problem's tests, in a process that can do no harm.

Each program gets limits on time, memory and output, an empty working folder, no network and a process namespace of
its own, which ends with it (`unshare` of util-linux). That guards against accidents and the idle mischief of a policy
in training, not against an attacker, who still reads the file system: for hostile code run the job in a container.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from vespo_megatron.errors import UserError

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_UNSHARE = ("unshare", "--net", "--pid", "--fork", "--kill-child")
_AS_USER = ("--user", "--map-current-user")
_MAX_OUTPUT_BYTES = 1 << 20


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
) -> dict[str, float]:
    """1 when the last fenced block of the response passes the problem's tests (`partial`: the share it passes).

    Args:
        ground_truth: the tests, or JSON of them: `{"inputs": [...], "outputs": [...]}` for programs that read and
            print, with `"fn_name"` for functions (arguments and result as JSON), `{"asserts": [...]}` or a list of
            Python statements, or `{"test": "…"}`, statements in one text (HumanEval+ and MBPP+).
        test_timeout: seconds for one test.
        memory_mb: address space of the program, in MiB.
        max_tests: tests to run at most, the first ones.

    Raises:
        UserError: tests of no known form, or the system gives no process without network.
    """
    tests = _tests(ground_truth, data_source)[:max_tests]
    program = last_program(solution_str)
    if program is None or not tests:
        return {"score": 0.0, "no_program": float(program is None)}
    passed = 0
    for test in tests:
        passed += test(program, test_timeout, memory_mb)
        if passed == 0 and not partial:
            break
    share = passed / len(tests)
    return {"score": share if partial else float(share == 1.0), "passed": share, "no_program": 0.0}


def last_program(text: str) -> str | None:
    """The last complete fenced block of a response; None without one."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else None


Test = Callable[[str, float, int], bool]
"""(program, seconds, MiB) → whether it passes."""


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
    def test(program: str, timeout: float, memory_mb: int) -> bool:
        status, printed = run(program, _text(given), timeout, memory_mb)
        return status == 0 and printed.split() == _text(wanted).split()

    return test


def _calls(name: str, given: Any, wanted: Any) -> Test:
    """A call with `given` (a list of arguments); a result in a list of one is accepted, as the public sets have it."""
    mark = "result of the call: "
    call = (
        "\nimport json as _json, sys as _sys\n"
        f"_target = globals().get({name!r}) or getattr(Solution(), {name!r})\n"
        f"_sys.stdout.write('\\n' + {mark!r} + _json.dumps(_target(*_json.load(_sys.stdin))))\n"
    )

    def test(program: str, timeout: float, memory_mb: int) -> bool:
        status, printed = run(program + call, json.dumps(given), timeout, memory_mb)
        _, found, answer = printed.rpartition(mark)
        if status != 0 or not found:
            return False
        try:
            value = json.loads(answer)
        except json.JSONDecodeError:
            return False
        return value == wanted or [value] == wanted

    return test


def _holds(statements: str) -> Test:
    def test(program: str, timeout: float, memory_mb: int) -> bool:
        # A program that leaves early with status 0 has not passed: the last line must have been reached.
        end = "\nimport sys as _sys\n_sys.stdout.write('\\nevery statement held')\n"
        status, printed = run(f"{program}\n{statements}{end}", "", timeout, memory_mb)
        return status == 0 and printed.endswith("every statement held")

    return test


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def run(program: str, given: str, timeout: float, memory_mb: int) -> tuple[int | None, str]:
    """Run a Python program; its status (None: it did not end in time) and the first MiB of what it printed.

    Raises:
        UserError: this system has no sandbox.
    """
    with tempfile.TemporaryDirectory(prefix="program-") as folder, tempfile.TemporaryFile() as output:
        with open(os.path.join(folder, ".program"), "w") as file:  # not on the command line: programs may be long
            file.write(program)
        environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*_sandbox(), sys.executable, "-I", ".program"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            preexec_fn=lambda: _limit(timeout, memory_mb),
        )
        try:
            process.communicate(given.encode(errors="replace"), timeout=timeout)
            status = process.returncode
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()  # and with it the first process of the namespace, and with that all of them
            process.wait(5)
        output.seek(0)
        return status, output.read(_MAX_OUTPUT_BYTES).decode(errors="replace")


def _limit(timeout: float, memory_mb: int) -> None:
    """In the child, before the program."""
    seconds = int(timeout) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_OUTPUT_BYTES * 16,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@cache
def _sandbox() -> tuple[str, ...]:
    """The command in front of the program's."""
    command = _UNSHARE if os.geteuid() == 0 else _UNSHARE + _AS_USER
    try:
        works = subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    if not works:
        raise UserError(
            f"{' '.join(command)} does not work on this system",
            where="env.reward code",
            expected="util-linux's unshare, with user namespaces for users other than root",
            fix="allow user namespaces (sysctl kernel.unprivileged_userns_clone=1), or score through env.reward=remote",
        )
    return command
