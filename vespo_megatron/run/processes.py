"""What processes of a run owe each other: to end with their parent, to stop on a signal, to say why they failed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vespo_megatron.errors import UserError
from vespo_megatron.machine_errors import explained as explained_by_machine

_PR_SET_PDEATHSIG = 1
EXIT_EXPLAINED = 2
"""A `UserError`: what is wrong was said."""
EXIT_RESUMABLE = 75
"""EX_TEMPFAIL of sysexits.h: stopped on request after a checkpoint; the same command resumes."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class TrainingFailed(Exception):
    """The trainer failed in a way that is no mistake of the input; the message holds what there is."""

    exit_code = 1


class Stopped(BaseException):
    """A signal asked this process to end. Not an `Exception`: no handler of failures may swallow it.

    Args:
        saved: what was saved before the end and where, when it was; the run can be resumed then.
    """

    def __init__(self, signum: int, saved: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}" + (f" {saved}" if saved else ""))
        self.exit_code = EXIT_RESUMABLE if saved else 128 + signum


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within the block, the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 raises `Stopped`.

    Later ones do not interrupt the clean-up.
    SIGHUP stays ignored under nohup. Does nothing outside the main thread, where Python lets no handler be set.
    """

    def stop(signum: int, _frame: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise Stopped(signum)

    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in _STOP_SIGNALS if not (nohup and number == signal.SIGHUP)]
    try:
        previous = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def die_with_parent(signum: int, parent: int | None = None) -> None:
    """Have the kernel send `signum` to this process when the thread that started it ends, even by SIGKILL.

    Args:
        parent: process id of the expected parent; when it is gone already, this process ends at once.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signum)


# ---- why a trainer process failed --------------------------------------------------------------------------------


def note_failure(run_dir: Path, rank: int, error: BaseException) -> int:
    """Write why this rank failed where the launcher looks, or say it where that cannot be written.

    Returns the exit code: `EXIT_EXPLAINED` for a `UserError`, else 1.
    """
    folder = run_dir / "errors"
    error = explained_by_machine(error) or error
    explained = isinstance(error, UserError)
    text = f"{error}\n" if explained else "".join(traceback.format_exception(error))
    name = f"rank_{rank}.txt" if explained else f"rank_{rank}.traceback.txt"
    partial = folder / f".{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(folder / name)
    except OSError:
        print(f"vespo-megatron: rank {rank}: {text}", end="", file=sys.stderr, flush=True)
    return EXIT_EXPLAINED if explained else 1


def note_death(run_dir: Path, rank: int, signum: int) -> None:
    """Write that a signal ended this rank, which could not say so itself; in the name, which needs no room."""
    folder = run_dir / "errors"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank_{rank}.signal_{signum}").touch()


def read_death(run_dir: Path) -> tuple[int, int] | None:
    """(rank, signal) of the rank whose death ended the run."""
    for note in sorted((run_dir / "errors").glob("rank_*.signal_*")):
        rank, signum = note.name.removeprefix("rank_").split(".signal_")
        return int(rank), int(signum)
    return None


def read_failure(run_dir: Path) -> tuple[str, bool] | None:
    """What to show of a failed run, and whether it is an explained `UserError`; None when no rank left a note.

    An explained error is the cause of the tracebacks beside it, which other ranks have because it took their peer away.
    """
    folder = run_dir / "errors"
    for pattern, explained in (("rank_*[0-9].txt", True), ("rank_*.traceback.txt", False)):
        notes = sorted(folder.glob(pattern), key=lambda note: note.stat().st_mtime_ns)
        if notes:
            rank = notes[0].name.removeprefix("rank_").split(".")[0]
            text = notes[0].read_text().rstrip()
            return (text if explained else f"rank {rank} failed:\n{text}", explained)
    return None


def clear_failures(run_dir: Path) -> None:
    """Remove the notes of an earlier attempt."""
    for note in (run_dir / "errors").glob("*rank_*"):  # tracebacks, explained errors and deaths
        note.unlink(missing_ok=True)


# ---- waiting -----------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool], timeout_s: float, interval_s: float = 0.05) -> bool:
    """Poll until `condition()` is true; False at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval_s)
    return True
