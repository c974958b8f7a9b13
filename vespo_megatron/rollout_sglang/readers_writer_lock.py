"""Readers–writer lock between generation (many at a time) and weight updates (one alone)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vespo_megatron.errors import UserError


class ReadersWriterLock:
    """For threads and event loops alike."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers, self._writing, self._blocked = 0, False, False

    async def acquire_read(self) -> None:
        """Wait until generation may begin."""
        while True:
            with self._condition:
                if not self._writing and not self._blocked:
                    self._readers += 1
                    return
            await asyncio.sleep(0.005)

    def release_read(self) -> None:
        """A generation has ended."""
        with self._condition:
            self._readers -= 1
            self._condition.notify_all()

    def block_readers(self) -> None:
        """Hold generations back."""
        with self._condition:
            self._blocked = True

    def admit_readers(self) -> None:
        """Let them in again."""
        with self._condition:
            self._blocked = False

    @contextmanager
    def write(self, timeout_s: float, *, wait: bool = True) -> Iterator[None]:
        """Alone inside; raises `UserError` when another update is under way or generation does not end in time.

        Without `wait` the generations that are inside stay; only new ones are held back.
        """
        with self._condition:
            if self._writing:
                raise UserError("a weight update is already under way", where="rollout engine")
            self._writing = True
        try:
            with self._condition:
                if wait and not self._condition.wait_for(lambda: self._readers == 0, timeout_s):
                    raise UserError(f"generation did not end within {timeout_s:g} s", where="rollout engine")
            yield
        finally:
            with self._condition:
                self._writing = False
