"""Running programs that a policy wrote: behind a wall, within bounds on time, memory, processes and output.

The bounds of one process are the kernel's (`prlimit`). Those of a program's processes together are looked after from
here, ten times a second or more; nothing of a program outlives its run.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vespo_megatron.rewards.syscall_filter import filter_program
from vespo_megatron.rewards.wall import ENVIRONMENT, NONE, Wall, memory_file

_PROGRAM = "/program.py"
_MAX_OUTPUT_BYTES = 1 << 20
_MAX_FILE_BYTES = 16 << 20
_MAX_PROCESSES, _MAX_FILES = 32, 128
_LOOK_EVERY_S = 0.05
_END_S = 60.0
_GRACE_S = 0.5
"""What the wall itself may take to come up and down."""


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds, and MiB of memory in all."""

    seconds: float
    memory_mb: int


@dataclass(frozen=True)
class Ended:
    """How a program ended: its status (None: it went beyond a bound) and the first MiB of what it printed."""

    status: int | None
    printed: str


class Running:
    """A program that runs; made by `running`, at whose end nothing of it is left."""

    def __init__(self, process: subprocess.Popen, output: int, limits: Limits) -> None:
        self._process, self._output, self._limits = process, output, limits
        self._deadline = time.monotonic() + limits.seconds + _GRACE_S

    def wait(self, *beside: Running) -> Ended:
        """Until it ends, or it or a program beside it goes beyond a bound."""
        while self._process.poll() is None:
            if time.monotonic() > self._deadline or any(each.goes_beyond() for each in (self, *beside)):
                return Ended(None, self._printed())
            _sleep_until_end(self._process.pid, _LOOK_EVERY_S)
        return Ended(self._process.returncode, self._printed())

    def goes_beyond(self) -> bool:
        """Whether its processes together are too many or too large."""
        number = memory = 0
        for pid in _descendants(self._process.pid):
            number += 1
            memory += _memory(pid)
        return number > 2 * _MAX_PROCESSES or memory > self._limits.memory_mb << 20

    def end(self) -> None:
        """End all of its processes."""
        if self._process.poll() is None:
            # The first process of its namespace: with it ends whatever is in there.
            for pid in list(_descendants(self._process.pid))[1:2]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_END_S)

    def _printed(self) -> str:
        return os.pread(self._output, _MAX_OUTPUT_BYTES, 0).decode(errors="replace")


@contextmanager
def running(
    program: str, limits: Limits, wall: Wall, *, given: str = "", channel: int | None = None
) -> Iterator[Running]:
    """Run a Python program with `given` as its input.

    Args:
        channel: a file descriptor that it inherits, whose number is its only argument.
    """
    with ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryFile())
        source = stack.enter_context(open(memory_file(given.encode(errors="replace")), "rb"))
        descriptors = [] if channel is None else [channel]
        if wall is NONE:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="program-"))
            file = Path(folder, ".program")
            file.write_text(program, errors="replace")
            command = _bounded(str(file), descriptors, limits, alone=False)
        else:
            folder = "/"
            for content in (program.encode(errors="replace"), filter_program()):
                descriptors.append(memory_file(content))
                stack.callback(os.close, descriptors[-1])
            inside = _bounded(_PROGRAM, descriptors[:-2], limits, alone=True)
            command = wall.command(inside, [(descriptors[-2], _PROGRAM)], descriptors[-1])
        process = subprocess.Popen(
            command,
            stdin=source,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=ENVIRONMENT | {"HOME": folder},
            pass_fds=descriptors,
            start_new_session=True,
        )
        run = Running(process, output.fileno(), limits)
        stack.callback(run.end)
        yield run


def run(program: str, given: str, limits: Limits, wall: Wall) -> Ended:
    """Run a Python program to its end, or to a bound."""
    with running(program, limits, wall, given=given) as process:
        return process.wait()


def _bounded(file: str, arguments: Sequence[int], limits: Limits, *, alone: bool) -> list[str]:
    """Python within the bounds of one process; `alone`: its user has no other, so that they can be counted."""
    bounds = {
        "cpu": int(limits.seconds) + 1,
        "as": limits.memory_mb << 20,
        "fsize": _MAX_FILE_BYTES,
        "nofile": _MAX_FILES,
        "core": 0,
    } | ({"nproc": _MAX_PROCESSES} if alone else {})
    words = [f"--{name}={value}:{value}" for name, value in bounds.items()]
    return ["prlimit", *words, sys.executable, "-I", file, *map(str, arguments)]


def _sleep_until_end(pid: int, seconds: float) -> None:
    descriptor = os.pidfd_open(pid)
    try:
        select.select([descriptor], [], [], seconds)
    finally:
        os.close(descriptor)


def _descendants(pid: int) -> Iterator[int]:
    """This process and all below it, parents first."""
    yield pid
    for task in _entries(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                yield from _descendants(int(child))


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _memory(pid: int) -> int:
    """Bytes that are in no file: what ending the process gives back."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssShmem")))
