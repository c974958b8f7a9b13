"""Stopping on request without losing anything: SIGTERM, SIGUSR1, SIGHUP → finish the step, save, end with status 75.

The launcher writes `<run_dir>/stop`; the ranks look at the end of each step, and agree on it, so that all of them leave
the loop after the same one. Under another launcher (torchrun, srun) whoever wants the run to stop writes that file.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.heartbeat import read_rank_statuses
from vespo_megatron.run.processes import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
STOP_FILE, STOPPED_FILE = "stop", "stopped.json"
_NOTE_BYTES = 4096
"""Of `STOPPED_FILE`, blanks until something is noted: overwriting them needs no room on the disk."""


class StopRequest:
    """A rank's view of it: `asked` says whether somebody wants the run to stop."""

    def __init__(self, run_dir: Path | None) -> None:
        self._run_dir = run_dir
        self.reason = ""
        """Why this rank itself wants to stop; empty when it was asked."""

    def asked(self) -> bool:
        """Whether the run's `stop` file is there."""
        return self._run_dir is not None and (self._run_dir / STOP_FILE).exists()

    def note_stopped(self, step: int, saved: str) -> None:
        """Say after which step this run left the loop, and where its state is."""
        if self._run_dir is not None:
            note = json.dumps({"step": step, "saved": saved, "reason": self.reason})
            file = os.open(self._run_dir / STOPPED_FILE, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, note.encode().ljust(_NOTE_BYTES), 0)
            finally:
                os.close(file)


class StopKeeper:
    """The launcher's side: within the block the first signal asks the ranks, the second or the deadline ends them.

    A terminal that goes away sends SIGHUP more than once: that is no second signal. Under nohup it is none at all.
    A run that could not be resumed (`checkpointing.enabled` is false, or no step has begun) ends at the first.
    """

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        self._run_dir, self._timeout = run_dir, recipe.cluster.stop_timeout
        self._saves = recipe.checkpointing.enabled and self._timeout > 0
        self._signum: int | None = None
        self._deadline = 0.0
        clear_stop(run_dir)

    def __enter__(self) -> StopKeeper:
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        wanted = [signum for signum in STOP_SIGNALS if not (nohup and signum == signal.SIGHUP)]
        try:
            self._previous = {signum: signal.signal(signum, self._on_signal) for signum in wanted}
        except ValueError:  # not the main thread, where Python lets no handler be set
            self._previous = {}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, _frame: object) -> None:
        if self._signum is not None and signum == signal.SIGHUP:
            return
        begun = any(status.step > 0 for status in read_rank_statuses(self._run_dir).values())
        if self._signum is not None or not self._saves or not begun:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            raise Stopped(signum)
        self._signum, self._deadline = signum, time.monotonic() + self._timeout
        (self._run_dir / STOP_FILE).touch()
        print(f"{signal.Signals(signum).name}: stopping after this step, within {self._timeout:.0f} s", flush=True)

    def check(self) -> None:
        """Raises `Stopped` when the ranks have not ended by themselves in time."""
        if self._signum is not None and time.monotonic() > self._deadline:
            raise Stopped(self._signum)

    def ended(self) -> None:
        """The ranks have ended well: raises `Stopped` when that was early and on request, `UserError` when not."""
        told = _read_note(self._run_dir)
        if told is None:
            return
        saved = f"after step {told['step']}: {told['saved']}" if told["saved"] else ""
        if told["reason"]:
            raise UserError(
                told["reason"],
                where=f"step {told['step']}",
                fix="see the run's report; guard.on_collapse=warn goes on" + (f"; saved {saved}" if saved else ""),
            )
        if self._signum is not None:
            raise Stopped(self._signum, saved)


def check_saved(run_dir: Path) -> None:
    """Raises UserError when the run left the loop early and could not save: whoever started it has no other sign."""
    told = _read_note(run_dir)
    if told is not None and not told["saved"]:
        raise UserError(f"stopped after step {told['step']}, unsaved", where=str(run_dir), fix="see why above")


def _read_note(run_dir: Path) -> dict[str, Any] | None:
    note = (run_dir / STOPPED_FILE).read_text().strip()
    return json.loads(note) if note else None


def clear_stop(run_dir: Path) -> None:
    """Remove the request and the note of an earlier attempt; make room for this one's."""
    (run_dir / STOP_FILE).unlink(missing_ok=True)
    (run_dir / STOPPED_FILE).write_text(" " * _NOTE_BYTES)
