"""Signs of life: what each rank is doing, where another process can read it even when the rank cannot answer.

A rank writes `<run_dir>/watchdog/rank_<n>.json` at every phase and micro-batch, and on SIGUSR2 every thread's stack to
`rank_<n>.stacks.txt`. Python's faulthandler does that inside the signal, so also where the interpreter is stuck in C++.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

STACK_SIGNAL = signal.SIGUSR2
_RECORD_BYTES = 512
"""Records have one length, so that a reader sees the old one or the new one."""


def heartbeat_folder(run_dir: Path) -> Path:
    """Where the ranks of a run leave their signs of life."""
    return run_dir / "watchdog"


@dataclass(frozen=True)
class RankStatus:
    """What a rank said last."""

    rank: int
    pid: int
    host: str
    count: int
    """Rises with every sign of life."""
    step: int
    phase: str


class Heartbeat:
    """This rank's signs of life; `step` and `phase` are what it says it is doing."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        folder = heartbeat_folder(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._stacks = (folder / f"rank_{rank}.stacks.txt").open("w")
        faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)
        self._file = os.open(folder / f"rank_{rank}.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._about = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname()}
        self._count = 0
        self.step, self.phase = 0, "set-up"
        self.beat()

    def beat(self) -> None:
        """Progress: the watchdog counts from here again. A record that cannot be written is left out."""
        self._count += 1
        status = self._about | {"count": self._count, "step": self.step, "phase": self.phase}
        record = json.dumps(status).encode()
        with contextlib.suppress(OSError):  # in place, which hardly any file system needs room for
            os.pwrite(self._file, record.ljust(_RECORD_BYTES)[:_RECORD_BYTES], 0)

    def enter(self, phase: str) -> str:
        """Say which phase begins; returns the one that is left."""
        left, self.phase = self.phase, phase
        self.beat()
        return left

    def close(self) -> None:
        """Take the files and the signal back: this rank has ended well and is not watched any more."""
        faulthandler.unregister(STACK_SIGNAL)
        self._stacks.close()
        os.ftruncate(self._file, 0)
        os.close(self._file)


def read_rank_statuses(run_dir: Path) -> dict[int, RankStatus]:
    """What every rank said last; ranks that have not begun or have ended are left out."""
    statuses = {}
    for file in heartbeat_folder(run_dir).glob("rank_*.json"):
        try:
            status = RankStatus(**json.loads(file.read_bytes()))
        except (OSError, ValueError, TypeError):
            continue
        statuses[status.rank] = status
    return dict(sorted(statuses.items()))


def clear_heartbeats(run_dir: Path) -> None:
    """Remove what an earlier attempt left."""
    for file in heartbeat_folder(run_dir).glob("rank_*"):
        file.unlink(missing_ok=True)
