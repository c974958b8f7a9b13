"""Who may take memory of devices that trainer and servers share: the trainer, or a server that starts, never both.

A server takes its whole share at its start, before anybody can ask for it. So the trainer holds this lock from the end
of a rollout to the beginning of the next, and whoever starts servers again holds it until they are ready.
"""

from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path
from typing import IO

from vespo_megatron.errors import UserError

_POLL_S = 0.05
_guard = threading.Lock()
_held_here: set[Path] = set()
"""Where flock is a network filesystem's it excludes processes, not threads of one."""


class StartLock:
    """One holder's end of the lock of a run directory; the kernel ends the hold of a process that dies."""

    def __init__(self, run_dir: str | Path) -> None:
        self._path = Path(run_dir).resolve() / "devices.lock"
        self._file: IO[bytes] | None = None

    @property
    def held(self) -> bool:
        """Whether this is the holder."""
        return self._file is not None

    def try_acquire(self) -> bool:
        """Hold it, unless another does; True for its holder."""
        with _guard:
            if self._file is not None:
                return True
            if self._path in _held_here:
                return False
            file = self._path.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                return False
            self._file = file
            _held_here.add(self._path)
            return True

    def acquire(self, timeout_s: float) -> None:
        """Hold it. Raises `UserError` when another does for so long."""
        deadline = time.monotonic() + timeout_s
        while not self.try_acquire():
            if time.monotonic() > deadline:
                raise UserError(
                    f"a server that starts has not been ready within {timeout_s:g} s",
                    where="devices that trainer and servers share",
                    fix="see the servers' logs",
                )
            time.sleep(_POLL_S)

    def release(self) -> None:
        """Hold it no more; idempotent."""
        with _guard:
            file, self._file = self._file, None
            if file is not None:
                fcntl.flock(file, fcntl.LOCK_UN)  # a forked child has the file open as well
                file.close()
                _held_here.discard(self._path)
