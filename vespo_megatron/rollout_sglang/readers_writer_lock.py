"""Readers–writer lock between generation (many at a time) and weight updates (one alone), for threads and event loops.

A writer that waits holds new readers back, so that it is never starved.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from vespo_megatron.errors import UserError

_POLL_S = 0.005


class ReadersWriterLock:
    """Generation reads the weights, a weight update writes them. Not re-entrant."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers, self._writing, self._blocked = 0, False, False

    @property
    def has_readers(self) -> bool:
        """Whether any generation is inside."""
        return self._readers > 0

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """One generation inside, in an event loop, which goes on while it waits to enter."""
        while not self._try_enter():
            await asyncio.sleep(_POLL_S)
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def read(self) -> Iterator[None]:
        """One generation inside, in a thread."""
        with self._condition:
            self._condition.wait_for(self._try_enter)
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def write(self, timeout_s: float | None = None, *, wait: bool = True) -> Iterator[None]:
        """One weight update inside; raises `UserError` when another is, or generation does not end in time.

        Args:
            timeout_s: how long generation may take to end; None is for ever.
            wait: without it the generations that are inside stay; only new ones are held back.
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
                self._condition.notify_all()

    def block_readers(self) -> None:
        """Hold new generations back until `admit_readers`, whether or not an update is under way."""
        with self._condition:
            self._blocked = True

    def admit_readers(self) -> None:
        """Let generations in again."""
        with self._condition:
            self._blocked = False
            self._condition.notify_all()

    def _try_enter(self) -> bool:
        with self._condition:  # re-entrant: a Condition's own lock is an RLock
            if self._writing or self._blocked:
                return False
            self._readers += 1
            return True

    def _leave(self) -> None:
        with self._condition:
            self._readers -= 1
            self._condition.notify_all()
