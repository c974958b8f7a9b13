"""Slots for requests in flight: who waits for one, who has it, and whether anything more is begun."""

from __future__ import annotations

import threading

from vespo_megatron.rollout_sglang.pool.dispatch import Dispatcher
from vespo_megatron.rollout_sglang.pool.membership import Membership
from vespo_megatron.rollout_sglang.pool.metrics import RolloutMetrics
from vespo_megatron.rollout_sglang.pool.server import PooledServer
from vespo_megatron.rollout_sglang.pool.waiters import Waiters


class NoServerLeft(Exception):
    """A call found no server that serves."""


class RequestSlots:
    """Requests in flight, of which every server has at most `limit`. Thread-safe.

    Args:
        limit: requests in flight per server.
        lock: of the pool; guards the servers and the metrics.
        waiters: woken when room is freed.
    """

    def __init__(
        self, limit: int, membership: Membership, lock: threading.Lock, metrics: RolloutMetrics, waiters: Waiters
    ) -> None:
        self.dispatcher = Dispatcher(limit)
        self.stopped = False
        """Whether nothing more is begun."""
        self._membership, self._lock, self._metrics, self._waiters = membership, lock, metrics, waiters

    async def acquire(self, group_id: str, count: int) -> PooledServer | None:
        """Wait for room for `count` requests at a server that serves; None when nothing more is to be begun.

        Raises `NoServerLeft` when no server serves.
        """
        with self._lock:
            self._metrics.waits(count)
        try:
            while True:
                with self._lock:
                    if self.stopped:
                        return None
                    loads = {server.number: server.in_flight for server in self._membership.serving}
                    if not loads:
                        raise NoServerLeft
                    number = self.dispatcher.choose(group_id, count, loads)
                    if number is not None:
                        server = self._membership.servers[number]
                        server.in_flight += count
                        self._metrics.load_changed(number, count)
                        return server
                    change = self._waiters.next_change()  # under the lock: what is freed from here on wakes it
                await change
        finally:
            with self._lock:
                self._metrics.waits(-count)

    def release(self, server: PooledServer, count: int) -> None:
        """`count` requests of a server have ended."""
        with self._lock:
            server.in_flight -= count
            self._metrics.load_changed(server.number, -count)
        self._waiters.wake_all()

    def stop(self) -> None:
        """Begin nothing more: whoever waits for room gets none."""
        with self._lock:
            self.stopped = True
        self._waiters.wake_all()

    def resume(self) -> None:
        """Begin again what is asked for."""
        with self._lock:
            self.stopped = False

    def forget_groups(self) -> None:
        """Prefix caches are empty: no group has a home."""
        with self._lock:
            self.dispatcher.forget()
