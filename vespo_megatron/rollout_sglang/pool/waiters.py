"""Coroutines of any event loop that wait until something about the pool has changed."""

from __future__ import annotations

import asyncio
import contextlib
import threading


class Waiters:
    """Futures, all of which a change resolves. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[asyncio.Future[None]] = []

    def next_change(self) -> asyncio.Future[None]:
        """A future of the running event loop that the next `wake_all` resolves."""
        change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiting.append(change)
        return change

    def wake_all(self) -> None:
        """Everyone who waits looks again."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for change in waiting:
            with contextlib.suppress(RuntimeError):  # that loop has ended, and whoever waited in it
                change.get_loop().call_soon_threadsafe(_resolve, change)


def _resolve(change: asyncio.Future[None]) -> None:
    if not change.done():
        change.set_result(None)
