"""Who may be inside: many generations, or one weight update; and no generation while paused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vespo_megatron.errors import UserError


class Gate:
    """For threads and event loops alike."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside, self._updating, self._closed = 0, False, False

    async def enter(self) -> None:
        """Wait until generation may begin."""
        while True:
            with self._condition:
                if not self._updating and not self._closed:
                    self._inside += 1
                    return
            await asyncio.sleep(0.005)

    def leave(self) -> None:
        """A generation has ended."""
        with self._condition:
            self._inside -= 1
            self._condition.notify_all()

    def close(self) -> None:
        """Hold generations back."""
        with self._condition:
            self._closed = True

    def open(self) -> None:
        """Let them in again."""
        with self._condition:
            self._closed = False

    @contextmanager
    def exclusive(self, timeout_s: float, *, wait: bool = True) -> Iterator[None]:
        """Alone inside; raises `UserError` when another update is under way or generation does not end in time.

        Without `wait` the generations that are inside stay; only new ones are held back.
        """
        with self._condition:
            if self._updating:
                raise UserError("a weight update is already under way", where="rollout engine")
            self._updating = True
        try:
            with self._condition:
                if wait and not self._condition.wait_for(lambda: self._inside == 0, timeout_s):
                    raise UserError(f"generation did not end within {timeout_s:g} s", where="rollout engine")
            yield
        finally:
            with self._condition:
                self._updating = False
