"""Many SGLang servers as one: each prompt is answered exactly once, whatever becomes of a server.

What a failed server was asked goes to another one, whole calls at a time: nothing of a failed call is ever used, so
no prompt is answered twice. Who serves is `membership`'s matter, who gets which request that of `slots` and
`dispatch`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.client.fan_out import PendingCall, replies
from vespo_megatron.rollout_sglang.client.session import open_session
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult
from vespo_megatron.rollout_sglang.faults import ServerFault, ServersFailed, WeightsNeeded, list_faults
from vespo_megatron.rollout_sglang.pool.dispatch import split_calls
from vespo_megatron.rollout_sglang.pool.health import watch_health
from vespo_megatron.rollout_sglang.pool.membership import MAX_FAULTS, Membership
from vespo_megatron.rollout_sglang.pool.metrics import RolloutMetrics
from vespo_megatron.rollout_sglang.pool.server import PooledServer, cancel_calls
from vespo_megatron.rollout_sglang.pool.slots import NoServerLeft, RequestSlots
from vespo_megatron.rollout_sglang.pool.waiters import Waiters

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

_CALL_SIZE = 16
"""Requests in one HTTP call at most: enough to hide the call's cost, few enough that results arrive as they finish."""
_QUIET_S = 3.0


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
        self.health_timeout_s = health_timeout_s
        self._lock, self._metrics, waiters = threading.Lock(), RolloutMetrics(len(clients)), Waiters()
        self.membership = Membership(clients, self._lock, self._metrics, waiters, recovery_timeout_s=recovery_timeout_s)
        self.slots = RequestSlots(max_concurrent, self.membership, self._lock, self._metrics, waiters)
        self._threads = ThreadPoolExecutor(max(4, len(clients)), thread_name_prefix="server-pool")

    @property
    def servers(self) -> list[PooledServer]:
        """All of them, in or out of service."""
        return self.membership.servers

    def on_all(self, method: Callable[[SGLangClient], T], servers: Iterable[PooledServer] | None = None) -> list[T]:
        """`method` for every server (those that serve, unless others are given), side by side, in order.

        Raises as `fan_out.replies`: one error that names each server that failed.
        """
        servers = self.membership.serving if servers is None else servers
        return replies([PendingCall(each.url, self._threads.submit(method, each.client)) for each in servers])

    def metrics(self) -> dict[str, float]:
        """Since the last call; see `pool.metrics`."""
        with self._lock:
            for server in self.servers:
                self._metrics.retries += server.client.retries
                server.client.retries = 0
            return self._metrics.pop(len(self.membership.serving))

    def close(self) -> None:
        """End the pool's threads; idempotent."""
        self.membership.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

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
            ServersFailed: no server is left and none came back; or a call failed on `MAX_FAULTS` servers.
            ServerFault: the only server failed, and is not to be waited for.
        """
        results: dict[int, GenerationResult] = {}

        def allowed() -> range:
            return range(version, (version if newest is None else newest()) + 1)

        def arrived(index: int, result: GenerationResult) -> None:
            results[index] = result
            if on_result is not None:
                on_result(result)

        async with open_session() as session:
            watch = asyncio.create_task(watch_health(self.membership, session, self.health_timeout_s))
            try:
                async with asyncio.TaskGroup() as tasks:
                    for indices in split_calls(requests, _CALL_SIZE):
                        tasks.create_task(self._answer(session, requests, indices, allowed, arrived))
            except BaseExceptionGroup as group:
                error = _first_error(group)
                if not isinstance(error, NoServerLeft):
                    raise error from None
            finally:
                watch.cancel()
        if len(results) < len(requests):
            faults = self.membership.faults
            back = await asyncio.to_thread(self.membership.wait_for_candidates)
            raise WeightsNeeded(
                f"back, for {len(requests) - len(results)} of {len(requests)} requests, after\n{list_faults(faults)}",
                where=", ".join(f"server {server.url}" for server in back),
                fix="update the weights, and ask for the rest again",
                faults=faults,
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
            server = await self.slots.acquire(wanted[0].group_id, len(wanted))
            if server is None:
                _not_begun(wanted, indices, arrived)
                return
            start = time.monotonic()
            try:
                answers = await self._reply_while_in_service(server, server.client.generate(session, wanted))
                _check_version(server, answers, allowed())
                break
            except ServerFault as fault:
                faults.append(fault)
                self.membership.take_out_of_service(server, fault)
            except _Abandoned:
                _not_begun(wanted, indices, arrived)
                return
            finally:
                self.slots.release(server, len(wanted))
            if len(faults) == MAX_FAULTS:
                request = f"request {wanted[0].request_id}"
                raise ServersFailed(f"failed on {MAX_FAULTS} servers", faults=faults, where=request)
            with self._lock:
                self._metrics.redispatched += len(wanted)
        tokens = sum(len(answer.output_ids) for answer in answers)
        with self._lock:
            server.faults_in_a_row = 0
            self._metrics.answered(server.number, len(wanted), tokens, time.monotonic() - start)
        for index, answer in zip(indices, answers, strict=True):
            arrived(index, answer)

    async def _reply_while_in_service(self, server: PooledServer, call: Awaitable[T]) -> T:
        """The call's answer, or the server's fault as soon as it is gone."""
        task = asyncio.ensure_future(call)
        with self._lock:
            server.calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling() == 0:
                if self.slots.stopped:
                    raise _Abandoned from None
                if server.fault is not None:
                    raise server.fault from None
            task.cancel()
            raise
        finally:
            with self._lock:
                server.calls.discard(task)

    def stop_dispatch(self) -> None:
        """Begin nothing more: what waits for room comes back as 'abort', with nothing drawn."""
        self.slots.stop()

    def resume_dispatch(self) -> None:
        """Begin again what is asked for."""
        self.slots.resume()

    async def wait_until_idle(self, quiet_s: float = _QUIET_S) -> None:
        """Return when no call is under way; to be called after `stop_dispatch`, of servers that were paused.

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
                cancel_calls(calls)
                since = time.monotonic()
            await asyncio.sleep(0.01)

    def admit(self, servers: Sequence[PooledServer]) -> None:
        """These, and no others, hold the current weights, checked; their prefix caches are empty."""
        self.slots.forget_groups()
        self.membership.admit(servers)


class _Abandoned(Exception):
    """A call was given up because its server is paused."""


def _check_version(server: PooledServer, answers: Sequence[GenerationResult], allowed: range) -> None:
    for answer in answers:
        found = sorted(set(answer.weight_versions.tolist()))
        if any(version not in allowed for version in found):
            raise ServerFault(
                f"answered with weight version {', '.join(map(str, found))}",
                url=server.url,
                where=f"server {server.url}, request {answer.request_id}",
                expected=f"version {allowed[0]}" + (f" to {allowed[-1]}" if len(allowed) > 1 else ""),
                fix="it was restarted or updated by someone else: update the weights again",
            )


def _not_begun(
    requests: Sequence[GenerationRequest], indices: Iterable[int], arrived: Callable[[int, GenerationResult], None]
) -> None:
    for index, request in zip(indices, requests, strict=True):
        none = np.zeros(0, np.int64)
        arrived(index, GenerationResult(request.request_id, none, none.astype(np.float32), none, "abort"))


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
    return min(errors, key=lambda error: (isinstance(error, NoServerLeft), not isinstance(error, UserError)))
