"""Membership in the pool: servers leave service when they fail, and come back with a weight update that included them.

- A server that fails is FAULTY: it gets no more requests; the calls it still has may end. It is tried again with the
  next weight update, unless it has failed `MAX_FAULTS` times in a row.
- A server that is GONE has its calls ended at once. Whoever owns its process may restart it
  (`server.ServerGroup.restart_dead` does); it is noticed again by `/server_info`.
- Both come back in a weight update alone: `candidates` take part in it, `join` marks them, and it ends in `admit`,
  after the checksum, or in `remove_failed`. After it they hold what the others hold.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.faults import ServerFault, ServerGone, ServersFailed, faults_of
from vespo_megatron.rollout_sglang.pool.metrics import RolloutMetrics
from vespo_megatron.rollout_sglang.pool.server import PooledServer, ServerState, cancel_calls
from vespo_megatron.rollout_sglang.pool.waiters import Waiters

MAX_FAULTS = 3
"""So often in a row a server may fail, or a call may be tried on different servers, before it is given up."""
_POLL_S = 0.5
_UP_TIMEOUT_S = 10.0


class Membership:
    """The servers of a pool. Thread-safe.

    Args:
        clients: one per server.
        lock: of the pool; guards the servers and the metrics.
        waiters: woken by every change of who serves.
        recovery_timeout_s: how long to wait for a server to come back when none serves.
    """

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        lock: threading.Lock,
        metrics: RolloutMetrics,
        waiters: Waiters,
        *,
        recovery_timeout_s: float,
    ) -> None:
        self.servers = [PooledServer(number, client) for number, client in enumerate(clients)]
        self.recovery_timeout_s = recovery_timeout_s
        self._lock, self._metrics, self._waiters = lock, metrics, waiters
        self._threads = ThreadPoolExecutor(max(4, len(clients)), thread_name_prefix="server-membership")

    @property
    def serving(self) -> list[PooledServer]:
        """Servers in service."""
        return [server for server in self.servers if server.state is ServerState.SERVING]

    @property
    def faults(self) -> list[ServerFault]:
        """Why servers are out of service."""
        return [server.fault for server in self.servers if server.fault is not None]

    def take_out_of_service(self, server: PooledServer, fault: ServerFault) -> None:
        """Send a server nothing more; what waits for a server that is gone ends with its fault."""
        with self._lock:
            gone = isinstance(fault, ServerGone)
            calls = set(server.calls) if gone else set()
            if server.state in (ServerState.SERVING, ServerState.JOINING):
                server.faults_in_a_row += 1
                self._metrics.servers[server.number].faults += 1
                server.fault = fault
                server.state = ServerState.GONE if gone else ServerState.FAULTY
            elif gone:
                server.fault, server.state = fault, ServerState.GONE
        cancel_calls(calls)
        self._waiters.wake_all()

    def candidates(self) -> list[PooledServer]:
        """Servers that can take part in a weight update now: all that are up and not given up.

        A server that was restarted unnoticed is known by its start; the calls it lost have been answered elsewhere.
        """
        return [server for server in self.up() if server.faults_in_a_row < MAX_FAULTS]

    def up(self) -> list[PooledServer]:
        """Servers that answer now, those that are given up among them."""
        starts = self._threads.map(_start_if_up, [server.client for server in self.servers])
        found = []
        for server, startup_time in zip(self.servers, starts, strict=True):
            if startup_time is None:
                if server.state in (ServerState.SERVING, ServerState.JOINING):
                    where = f"server {server.url} /server_info"
                    self.take_out_of_service(server, ServerGone("cannot be reached", url=server.url, where=where))
                continue
            if startup_time != server.startup_time:
                server.startup_time, server.faults_in_a_row = startup_time, 0
                self.take_out_of_service(server, ServerGone("was restarted, with old weights", url=server.url))
            found.append(server)
        return found

    def wait_for_candidates(self) -> list[PooledServer]:
        """As `candidates`, but wait for one; only a server that is gone is waited for.

        Raises `ServerFault` or `ServersFailed` with every server's fault when there is nothing to wait for, or at
        `recovery_timeout`.
        """
        deadline = time.monotonic() + self.recovery_timeout_s
        while True:
            back = [server for server in self.candidates() if server.state is not ServerState.FAULTY]
            if back:
                return back
            waited = any(server.state is ServerState.GONE for server in self.servers)
            if not waited or time.monotonic() > deadline:
                faults = self.faults
                until = f" for {self.recovery_timeout_s:g} s" if waited else ""
                if len(faults) == 1 and not waited:
                    raise faults[0]
                raise ServersFailed(
                    f"no server is left{until}",
                    faults=faults,
                    where="rollout servers",
                    fix="see the servers' logs; policy.generation.sglang_cfg.max_restarts restarts own ones",
                )
            time.sleep(min(_POLL_S, self.recovery_timeout_s / 4))

    def join(self, servers: Sequence[PooledServer]) -> bool:
        """These take part in a weight update, which ends in `admit` or `remove_failed`.

        Returns whether any of them did not serve: it may be another process, which knows no group of before.
        """
        with self._lock:
            joining = [server for server in servers if server.state is not ServerState.SERVING]
            for server in joining:
                server.state = ServerState.JOINING
        return bool(joining)

    def admit(self, servers: Sequence[PooledServer]) -> None:
        """These, and no others, hold the current weights, and checksums say so."""
        with self._lock:
            for server in servers:
                if server.state is not ServerState.SERVING:
                    self._metrics.readmitted += 1
                server.state, server.fault = ServerState.SERVING, None
        self._waiters.wake_all()

    def remove_failed(self, error: UserError, members: Sequence[PooledServer]) -> list[PooledServer]:
        """Take those out of service that a weight update of `members` failed at, and return them.

        They are the servers that the error's faults are of; where it has none, all that are not up.
        """
        faults = {fault.url: fault for fault in faults_of(error)}
        failed = [server for server in members if server.url in faults]
        for server in failed:
            self.take_out_of_service(server, faults[server.url])
        if failed:
            return failed
        up = self.candidates()
        return [server for server in members if server not in up]

    def may_come_back(self, servers: Sequence[PooledServer]) -> bool:
        """Whether one of these is gone, and so may be started again; what answers wrongly is not waited for."""
        return any(server.state is ServerState.GONE for server in servers)

    def close(self) -> None:
        """End the threads; idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _start_if_up(client: SGLangClient) -> object:
    """What a server says of its start, None while it is not up (its scheduler takes part in the answer).

    `/ready` says no while a server is paused, as one is between a failed weight update and the next.
    """
    try:
        return client.server_info(timeout_s=_UP_TIMEOUT_S).startup_time
    except ServerFault:
        return None
