"""One run of a study: a process in a session of its own, its output in a log.

Runs of one trainer process are forked from a process that has imported what every run needs, which spares each of them
some seconds; others are a `vespo-megatron train` in processes of its own.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from vespo_megatron.run.processes import die_with_parent

_COMMAND = "vespo_megatron.cli"


class RunProcess(Protocol):
    """A run in progress."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended by then."""


def stop(process: RunProcess) -> None:
    """Ask it to; it saves where its recipe says so."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGTERM)


def end(process: RunProcess, timeout_s: float) -> None:
    """Wait for it, and when that takes too long end it and what is in its process group."""
    if not process.wait(timeout_s):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class CommandRun:
    """`vespo-megatron train` of a recipe."""

    def __init__(self, recipe_file: Path, log: Path, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", _COMMAND, "train", str(recipe_file)]
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout_s: float | None = None) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


class RunForker:
    """Forks runs. All have the environment it was made with, which libraries read as they are loaded."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["vespo_megatron.launch.preload"])
        with _environment(self.environment):
            forkserver.ensure_running()

    def start(self, recipe_file: Path, log: Path) -> ForkedRun:
        """`vespo-megatron train` of a recipe of one process."""
        process = self._context.Process(target=_train, args=(str(recipe_file), str(log), self.environment))
        process.start()
        return ForkedRun(process)


class ForkedRun:
    """A run that a `RunForker` started."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid = process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> bool:
        self._process.join(timeout_s)
        return self._process.exitcode is not None


def _train(recipe_file: str, log: str, environment: Mapping[str, str]) -> None:
    """In the forked process: the same command as `CommandRun`'s, without starting Python anew."""
    os.environ.clear()  # where this process already had something to fork from, that has another environment
    os.environ.update(environment)
    os.setsid()
    die_with_parent(signal.SIGTERM)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    arguments = ["train", recipe_file]
    print(f"$ vespo-megatron {shlex.join(arguments)}", flush=True)
    sys.exit(importlib.import_module(_COMMAND).main(arguments))


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Within the block this process has exactly these variables."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(wanted)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
