"""The server pool: many SGLang servers as one, each prompt answered exactly once whatever becomes of a server.

A server is in one of four states:

- SERVING: it holds the current weights, checked. Only such a server gets requests.
- FAULTY: it answers, but wrongly (an error status, a reply that breaks the contract, old weights, a deadline). It gets
  no more requests; the calls it still has may end. It is tried again with the next weight update, unless it has failed
  `_MAX_FAULTS` times in a row.
- GONE: it cannot be reached, or its health check has failed for `health_timeout`. Its calls end at once. Whoever owns
  its process may restart it (`server.ServerGroup.restart_dead` does); it is noticed again by `/server_info`.

- JOINING: it was one of the latter two, and takes part in a weight update.

What a failed server was asked goes to another one, whole calls at a time: nothing of a failed call is ever used, so
no prompt is answered twice. A server comes back in `update_weights` alone (`candidates`, `admit`): after the update and
its checksum it holds what the others hold.
"""

from __future__ import annotations

import asyncio
import enum
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult
from vespo_megatron.rollout_sglang.faults import ServerFault, ServerGone, WeightsNeeded, as_fault
from vespo_megatron.rollout_sglang.pool.dispatch import Dispatcher, split_calls
from vespo_megatron.rollout_sglang.pool.metrics import RolloutMetrics

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

_CALL_SIZE = 16
"""Requests in one HTTP call at most: enough to hide the call's cost, few enough that results arrive as they finish."""
_MAX_FAULTS = 3
"""So often in a row a server may fail, or a call may be tried on different servers, before it is given up."""
_POLL_S = 0.5
_QUIET_S = 3.0
_UP_TIMEOUT_S = 10.0


class State(enum.Enum):
    """See the module's docstring."""

    SERVING = "serving"
    FAULTY = "faulty"
    GONE = "gone"
    JOINING = "joining"


@dataclass
class Server:
    """One server and what the pool knows of it."""

    number: int
    client: SGLangClient
    started: Any = None
    """Its start, as it says itself: another value is another process with other weights."""
    state: State = State.SERVING
    fault: ServerFault | None = None
    faults_in_a_row: int = 0
    in_flight: int = 0
    calls: set[asyncio.Future[Any]] = field(default_factory=set)
    """What waits for its answer, each in its own event loop."""

    @property
    def url(self) -> str:
        return self.client.url


class ServerPool:
    """See the module's docstring. Thread-safe; `generate` runs in any event loop.

    Args:
        clients: one per server, all of the same model.
        max_concurrent: requests in flight per server.
        health_timeout_s: a server that has work and has not answered a health check for so long is gone; 0: never.
        recovery_timeout_s: how long to wait for a server to come back when none serves.
    """

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        *,
        max_concurrent: int = 1024,
        health_timeout_s: float = 60.0,
        recovery_timeout_s: float = 300.0,
    ) -> None:
        self.servers = [Server(number, client) for number, client in enumerate(clients)]
        self.health_timeout_s, self.recovery_timeout_s = health_timeout_s, recovery_timeout_s
        self._dispatcher = Dispatcher(max_concurrent)
        self._metrics = RolloutMetrics(len(clients))
        self._lock = threading.Lock()
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()
        self._dispatch_stopped = False
        self._threads = ThreadPoolExecutor(max(4, len(clients)), thread_name_prefix="server-pool")

    def on_all(self, method: Callable[[SGLangClient], T], servers: Iterable[Server] | None = None) -> list[T]:
        """`method` for every server (those that serve, unless others are given), side by side, in order."""
        servers = self.serving if servers is None else servers
        return list(self._threads.map(method, [server.client for server in servers]))

    @property
    def serving(self) -> list[Server]:
        """Servers in service."""
        return [server for server in self.servers if server.state is State.SERVING]

    def metrics(self) -> dict[str, float]:
        """Since the last call; see `rollout_metrics`."""
        with self._lock:
            for server in self.servers:
                self._metrics.retries += server.client.retries
                server.client.retries = 0
            return self._metrics.pop(len(self.serving))

    def close(self) -> None:
        """End the pool's threads; idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ---- generation ------------------------------------------------------------------------------------------------

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        version: int,
        newest: Callable[[], int] | None = None,
        on_result: Callable[[GenerationResult], None] | None = None,
    ) -> list[GenerationResult]:
        """Results in the order of `requests`, all drawn under weight version `version` or a later one up to `newest()`.

        Raises:
            WeightsNeeded: the last server failed, and one is back that needs weights.
            UserError: no server is left and none came back; or a call failed on `_MAX_FAULTS` servers.
        """
        import aiohttp

        results: dict[int, GenerationResult] = {}

        def allowed() -> range:
            return range(version, (version if newest is None else newest()) + 1)

        def arrived(index: int, result: GenerationResult) -> None:
            results[index] = result
            if on_result is not None:
                on_result(result)

        connector = aiohttp.TCPConnector(limit=0, force_close=False)
        async with aiohttp.ClientSession(connector=connector) as session:
            watch = asyncio.create_task(self._watch(session))
            try:
                async with asyncio.TaskGroup() as tasks:
                    for indices in split_calls(requests, _CALL_SIZE):
                        tasks.create_task(self._answer(session, requests, indices, allowed, arrived))
            except BaseExceptionGroup as group:
                error = _first_error(group)
                if not isinstance(error, _NoServerLeft):
                    raise error from None
            finally:
                watch.cancel()
        if len(results) < len(requests):
            lost = _list(self._faults())
            back = await asyncio.to_thread(self.wait_for_candidates)
            raise WeightsNeeded(
                f"back, for {len(requests) - len(results)} of {len(requests)} requests, after\n{lost}",
                where=", ".join(f"server {server.url}" for server in back),
                fix="update the weights, and ask for the rest again",
            )
        return [results[index] for index in range(len(requests))]

    async def _answer(
        self,
        session: aiohttp.ClientSession,
        requests: Sequence[GenerationRequest],
        indices: list[int],
        allowed: Callable[[], range],
        arrived: Callable[[int, GenerationResult], None],
    ) -> None:
        """One call, on as many servers as it takes."""
        wanted = [requests[index] for index in indices]
        faults: list[ServerFault] = []
        while True:
            server = await self._take(wanted[0].group_id, len(wanted))
            if server is None:
                return _not_begun(wanted, indices, arrived)
            start = time.monotonic()
            try:
                answers = await self._while_present(server, server.client.generate(session, wanted))
                _check_version(server, answers, allowed())
                break
            except ServerFault as fault:
                faults.append(fault)
                self.lose(server, fault)
            except _Abandoned:
                return _not_begun(wanted, indices, arrived)
            finally:
                self._give_back(server, len(wanted))
            if len(faults) == _MAX_FAULTS:
                raise UserError(
                    f"failed on {_MAX_FAULTS} servers:\n" + _list(faults), where=f"request {wanted[0].request_id}"
                )
            with self._lock:
                self._metrics.redispatched += len(wanted)
        tokens = sum(len(answer.output_ids) for answer in answers)
        with self._lock:
            server.faults_in_a_row = 0
            self._metrics.answered(server.number, len(wanted), tokens, time.monotonic() - start)
        for index, answer in zip(indices, answers, strict=True):
            arrived(index, answer)

    async def _take(self, group_id: str, count: int) -> Server | None:
        """Wait for room for `count` requests at a server that serves; None when nothing more is to be begun."""
        loop = asyncio.get_running_loop()
        with self._lock:
            self._metrics.waits(count)
        try:
            while True:
                with self._lock:
                    if self._dispatch_stopped:
                        return None
                    loads = {server.number: server.in_flight for server in self.serving}
                    if not loads:
                        raise _NoServerLeft
                    number = self._dispatcher.choose(group_id, count, loads)
                    if number is not None:
                        server = self.servers[number]
                        server.in_flight += count
                        self._metrics.load_changed(number, count)
                        return server
                    room = loop.create_future()
                    self._waiting.append((loop, room))
                await room
        finally:
            with self._lock:
                self._metrics.waits(-count)

    def _give_back(self, server: Server, count: int) -> None:
        with self._lock:
            server.in_flight -= count
            self._metrics.load_changed(server.number, -count)
        self._wake()

    def _wake(self) -> None:
        """Everyone who waits for room looks again."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
        for loop, room in waiting:
            try:
                loop.call_soon_threadsafe(_resolve, room)
            except RuntimeError:  # that loop has ended, and whoever waited in it
                pass

    async def _while_present(self, server: Server, call: Awaitable[T]) -> T:
        """The call's answer, or the server's fault as soon as it is gone."""
        task = asyncio.ensure_future(call)
        with self._lock:
            server.calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling() == 0:
                if self._dispatch_stopped:
                    raise _Abandoned from None
                if server.fault is not None:
                    raise server.fault from None
            task.cancel()
            raise
        finally:
            with self._lock:
                server.calls.discard(task)

    # ---- health ----------------------------------------------------------------------------------------------------

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        """While there is work: `/health`, which on SGLang 0.5.23 means that its scheduler has answered something."""
        if self.health_timeout_s <= 0:
            return
        await asyncio.gather(*(self._watch_one(session, server) for server in self.serving))

    async def _watch_one(self, session: aiohttp.ClientSession, server: Server) -> None:
        deadline = self.health_timeout_s
        seen = time.monotonic()
        while server.state is State.SERVING:
            await asyncio.sleep(deadline / 4)
            if server.in_flight == 0 or await server.client.is_healthy(session, timeout_s=deadline / 2):
                seen = time.monotonic()
            elif time.monotonic() - seen > deadline:
                self.lose(
                    server,
                    ServerGone(
                        f"has shown no sign of life for {deadline:g} s",
                        where=f"server {server.url} /health",
                        fix="see the server's log, or raise policy.generation.sglang_cfg.health_timeout",
                    ),
                )

    def lose(self, server: Server, fault: ServerFault) -> None:
        """Take a server out of service; what waits for a server that is gone ends with its fault."""
        with self._lock:
            gone = isinstance(fault, ServerGone)
            calls = set(server.calls) if gone else set()
            if server.state in (State.SERVING, State.JOINING):
                server.faults_in_a_row += 1
                self._metrics.servers[server.number].faults += 1
                server.fault = fault
                server.state = State.GONE if gone else State.FAULTY
            elif gone:
                server.fault, server.state = fault, State.GONE
        _cancel(calls)
        self._wake()

    # ---- pauses ----------------------------------------------------------------------------------------------------

    def stop_dispatch(self) -> None:
        """Begin nothing more: what waits for room comes back as 'abort', with nothing drawn."""
        with self._lock:
            self._dispatch_stopped = True
        self._wake()

    def resume_dispatch(self) -> None:
        """Begin again what is asked for."""
        with self._lock:
            self._dispatch_stopped = False

    async def ended(self, quiet_s: float = _QUIET_S) -> None:
        """While held and after the servers were paused: return when no call is under way.

        A paused server answers at once what it has begun. What reached it after the pause it would keep until it goes
        on, so that whoever waits for both would wait for good: calls are given up, as 'abort' with nothing drawn, once
        none has ended for `quiet_s`.
        """
        before, since = -1, time.monotonic()
        while (under_way := sum(len(server.calls) for server in self.servers)) > 0:
            if under_way != before:
                before, since = under_way, time.monotonic()
            elif time.monotonic() - since > quiet_s:
                with self._lock:
                    calls = {call for server in self.servers for call in server.calls}
                _cancel(calls)
                since = time.monotonic()
            await asyncio.sleep(0.01)

    # ---- membership ------------------------------------------------------------------------------------------------

    def candidates(self) -> list[Server]:
        """Servers that can take part in a weight update now: all that are up and not given up.

        A server that was restarted unnoticed is known by its start; the calls it lost have been answered elsewhere.
        """
        starts = self._threads.map(_start_if_up, [server.client for server in self.servers])
        found = []
        for server, started in zip(self.servers, starts, strict=True):
            if started is None:
                if server.state in (State.SERVING, State.JOINING):
                    self.lose(server, ServerGone("cannot be reached", where=f"server {server.url} /server_info"))
                continue
            if started != server.started:
                url, server.started, server.faults_in_a_row = server.url, started, 0
                self.lose(server, ServerGone("was restarted, with old weights", where=f"server {url}"))
            if server.faults_in_a_row < _MAX_FAULTS:
                found.append(server)
        return found

    def wait_for_candidates(self) -> list[Server]:
        """As `candidates`, but wait for one; only a server that is gone is waited for.

        Raises `UserError` with every server's fault when there is nothing to wait for, or at `recovery_timeout`.
        """
        deadline = time.monotonic() + self.recovery_timeout_s
        while True:
            back = [server for server in self.candidates() if server.state is not State.FAULTY]
            if back:
                return back
            waited = any(server.state is State.GONE for server in self.servers)
            if not waited or time.monotonic() > deadline:
                faults = self._faults()
                until = f" for {self.recovery_timeout_s:g} s" if waited else ""
                if len(faults) == 1 and not waited:
                    raise faults[0]
                raise UserError(
                    f"no server is left{until}:\n" + _list(faults),
                    where="rollout servers",
                    fix="see the servers' logs; policy.generation.sglang_cfg.max_restarts restarts own ones",
                )
            time.sleep(min(_POLL_S, self.recovery_timeout_s / 4))

    def _faults(self) -> list[ServerFault]:
        return [server.fault for server in self.servers if server.fault is not None]

    def admit(self, servers: Sequence[Server]) -> None:
        """These, and no others, hold the current weights, and checksums say so."""
        with self._lock:
            for server in servers:
                if server.state is not State.SERVING:
                    self._metrics.readmitted += 1
                server.state, server.fault = State.SERVING, None
            self._dispatcher.forget()
        self._wake()

    def join(self, servers: Sequence[Server]) -> bool:
        """These take part in a weight update, which ends in `admit` or `blame`.

        Returns whether any of them did not serve: it may be another process, which knows no group of before.
        """
        with self._lock:
            joining = [server for server in servers if server.state is not State.SERVING]
            for server in joining:
                server.state = State.JOINING
        return bool(joining)

    def blame(self, error: UserError, members: Sequence[Server]) -> list[Server]:
        """The servers that a weight update failed at, now out of service: the one that is named, or all not up."""
        named = [server for server in members if f"{server.url} " in f"{error.where} ".replace(",", " ")]
        for server in named:
            kind = ServerGone if "cannot be reached" in error.what else ServerFault
            self.lose(server, as_fault(error, kind))
        if named:
            return named
        up = self.candidates()
        return [server for server in members if server not in up]


class _NoServerLeft(Exception):
    """A call found no server that serves."""


def _check_version(server: Server, answers: Sequence[GenerationResult], allowed: range) -> None:
    for answer in answers:
        found = sorted(set(answer.weight_versions.tolist()))
        if any(version not in allowed for version in found):
            raise ServerFault(
                f"answered with weight version {', '.join(map(str, found))}",
                where=f"server {server.url}, request {answer.request_id}",
                expected=f"version {allowed[0]}" + (f" to {allowed[-1]}" if len(allowed) > 1 else ""),
                fix="it was restarted or updated by someone else: update the weights again",
            )


def _start_if_up(client: SGLangClient) -> Any:
    """What a server says of its start, None while it is not up (its scheduler takes part in the answer).

    `/ready` says no while a server is paused, as one is between a failed weight update and the next.
    """
    try:
        return client.call("/server_info", timeout_s=_UP_TIMEOUT_S).get("startup_time", 0)
    except UserError:
        return None


class _Abandoned(Exception):
    """A call was given up because its server is paused."""


def _not_begun(
    requests: Sequence[GenerationRequest], indices: Iterable[int], arrived: Callable[[int, GenerationResult], None]
) -> None:
    for index, request in zip(indices, requests, strict=True):
        none = np.zeros(0, np.int64)
        arrived(index, GenerationResult(request.request_id, none, none.astype(np.float32), none, "abort"))


def _cancel(calls: Iterable[asyncio.Future[Any]]) -> None:
    """Each in its own event loop."""
    for call in calls:
        try:
            call.get_loop().call_soon_threadsafe(call.cancel)
        except RuntimeError:  # that loop has ended, and its tasks with it
            pass


def _resolve(room: asyncio.Future[None]) -> None:
    if not room.done():
        room.set_result(None)


def _list(faults: Iterable[UserError]) -> str:
    return "\n".join("  " + f"{fault.where}: {fault.what}" for fault in faults)


def _first_error(group: BaseExceptionGroup) -> BaseException:
    """The error that says most: an explained one before others, a server's end last."""
    errors: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending += error.exceptions
        else:
            errors.append(error)
    return min(errors, key=lambda error: (isinstance(error, _NoServerLeft), not isinstance(error, UserError)))
