"""Where a generation stands still between two of its steps, for as long as somebody holds it there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StepGate:
    """Between threads that run steps and one that changes what they run on."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside, self._standing, self._held = 0, 0, False

    @contextmanager
    def running(self) -> Iterator[None]:
        """What must stand, or have ended, before `hold` is entered."""
        with self._condition:
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    def stand(self) -> None:
        """Between two steps: return when nobody holds."""
        with self._condition:
            if not self._held:
                return
            self._standing += 1
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._held)
            self._standing -= 1

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Entered when all that runs stands; it goes on at the end. Whoever holds sees to it that nothing begins."""
        with self._condition:
            self._held = True
            self._condition.wait_for(lambda: self._standing == self._inside)
        try:
            yield
        finally:
            with self._condition:
                self._held = False
                self._condition.notify_all()
