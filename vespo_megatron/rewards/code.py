"""Code that answers: run the response's program on the problem's tests, in a process that can do no harm.

Each program gets limits on time, memory and output, an empty working folder, no network and a process namespace of
its own, which ends with it (`unshare` of util-linux). That guards against accidents and the idle mischief of a policy
in training, not against an attacker, who still reads the file system: for hostile code run the job in a container.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.rewards.code_tests import Calls, CodeTest, Prints, read_tests
from vespo_megatron.rewards.programs import last_program, prepare

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
        ground_truth: the tests, or JSON of them, in any form of `code_tests`.
        test_timeout: seconds for one test.
        memory_mb: address space of the program, in MiB.
        max_tests: tests to run at most, the first ones.

    Raises:
        UserError: tests of no known form, or the system gives no process without network.
    """
    tests = read_tests(ground_truth, f"ground truth of {data_source}")[:max_tests]
    program = last_program(solution_str)
    if program is None or not tests:
        return {"score": 0.0, "no_program": float(program is None)}
    passed = 0
    for test in tests:
        passed += _passes(test, program, test_timeout, memory_mb)
        if passed == 0 and not partial:
            break
    share = passed / len(tests)
    return {"score": share if partial else float(share == 1.0), "passed": share, "no_program": 0.0}


def _passes(test: CodeTest, program: str, timeout: float, memory_mb: int) -> bool:
    if isinstance(test, Prints):
        status, printed = run(prepare(program, as_main=True), test.given, timeout, memory_mb)
        return status == 0 and test.accepts(printed)
    if isinstance(test, Calls):
        return _returns(test, prepare(program, as_main=False), timeout, memory_mb)
    # A program that leaves early with status 0 has not passed: the last line must have been reached.
    end = "\nimport sys as _sys\n_sys.stdout.write('\\nevery statement held')\n"
    status, printed = run(prepare(f"{program}\n{test.statements}", as_main=False) + end, "", timeout, memory_mb)
    return status == 0 and printed.endswith("every statement held")


def _returns(test: Calls, program: str, timeout: float, memory_mb: int) -> bool:
    mark = "result of the call: "
    call = (
        "\nimport json as _json, sys as _sys\n"
        f"_target = globals().get({test.name!r}) or getattr(Solution(), {test.name!r})\n"
        f"_answer = _target(*{list(test.arguments)!r})\n"
        f"_sys.stdout.write('\\n' + {mark!r} + _json.dumps(_answer, default=list))\n"
    )
    status, printed = run(program + call, "", timeout, memory_mb)
    _, found, answer = printed.rpartition(mark)
    if status != 0 or not found:
        return False
    try:
        return test.accepts(json.loads(answer))
    except json.JSONDecodeError:
        return False


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
