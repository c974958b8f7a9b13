"""`SGLangEngine`: the `RolloutEngine` over one or more SGLang servers, by HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rollout_sglang.api_key import api_key
from vespo_megatron.rollout_sglang.client.client import UNKNOWN_VERSION, SGLangClient
from vespo_megatron.rollout_sglang.client.contract import check_contract, check_settings, foreign
from vespo_megatron.rollout_sglang.client.request import check_request
from vespo_megatron.rollout_sglang.client.session import open_session
from vespo_megatron.rollout_sglang.engine import (
    GenerationRequest,
    GenerationResult,
    RolloutEngine,
    SamplingParams,
    ScoredResponse,
)
from vespo_megatron.rollout_sglang.faults import ServerFault, ServerGone, WeightsNeeded, as_one_error, faults_of
from vespo_megatron.rollout_sglang.pool.pool import ServerPool
from vespo_megatron.rollout_sglang.pool.server import PooledServer
from vespo_megatron.rollout_sglang.readers_writer_lock import ReadersWriterLock
from vespo_megatron.rollout_sglang.server.flags import check_served, context_length, lacks_its_head
from vespo_megatron.rollout_sglang.start_lock import StartLock
from vespo_megatron.rollout_sglang.weight_sync import WeightSync, make_sync

if TYPE_CHECKING:
    import numpy as np
    import torch


_MARGIN_S = 30.0
"""Beyond a server's own deadline: whoever started it ends it first."""


def connect(
    recipe: Recipe,
    urls: Sequence[str],
    *,
    takes_over: bool = True,
    device: str | None = None,
    run_dir: str | Path | None = None,
) -> SGLangEngine:
    """An engine over servers that run; asks each what it is and probes it with one token.

    Args:
        takes_over: the servers are the caller's from now on, and put into a known state first: a trainer that was
            killed may have left them paused, in the middle of an update. Else they are asked as they are.
        device: where the trainer's weights are, "cuda" or "cpu"; None follows the servers.
        run_dir: of the run whose devices the servers share, if they do; see `start_lock`.

    Raises `UserError` for a server that cannot be reached, serves another context or model, or returns no routes
    though the recipe wants them.
    """
    config = recipe.policy.generation.sglang_cfg
    if not urls:
        raise UserError("no server", where="policy.generation.sglang_cfg.urls", fix="launch servers or give their URLs")
    shape = read_shape(recipe.policy.model_name)
    check_served(shape, recipe.policy.model_name)
    context = context_length(recipe, shape)
    clients = [
        SGLangClient(
            url,
            shape,
            context_length=context,
            return_routes=config.enable_return_routed_experts,
            request_timeout_s=config.request_timeout,
            keep_bad_numbers=recipe.loss_fn.on_bad_sample == "drop",
            api_key=api_key(config),
        )
        for url in urls
    ]
    pool = ServerPool(
        clients,
        max_concurrent=config.max_concurrent_requests,
        health_timeout_s=config.health_timeout,
        recovery_timeout_s=config.recovery_timeout,
    )
    starts = None if run_dir is None else StartLock(run_dir)
    return SGLangEngine(
        pool,
        lambda clients, served: make_sync(config, clients, device or served),
        takes_over=takes_over,
        starts=starts,
        start_timeout_s=config.startup_timeout + _MARGIN_S,
    )


class SGLangEngine:
    """See `RolloutEngine`. One weight update at a time; generation may run from any event loop.

    Args:
        pool: the servers, all of the same model.
        make_sync: their weight sync, from the clients and the device they report.
        takes_over: see `connect`.
        starts: is held while the servers' memory is the trainer's.
        start_timeout_s: how long a server may take to start, for which `release_memory` waits.
    """

    def __init__(
        self,
        pool: ServerPool,
        make_sync: Callable[[list[SGLangClient], str], WeightSync],
        *,
        takes_over: bool = True,
        starts: StartLock | None = None,
        start_timeout_s: float = 300.0,
    ) -> None:
        self.pool, self._starts, self._start_timeout_s = pool, starts, start_timeout_s
        self.clients = [server.client for server in pool.servers]
        self.shape, self.context_length = self.clients[0].shape, self.clients[0].context_length
        pool.on_all(SGLangClient.take_over if takes_over else _refuse_unless_ready)
        infos = pool.on_all(SGLangClient.server_info)
        for server, info in zip(pool.servers, infos, strict=True):
            check_contract(server.client, info)
            check_settings(server.client, info)
            server.startup_time = info.startup_time
        served = infos[0].device
        self.description = f"SGLang {infos[0].version} at {', '.join(c.url for c in self.clients)} ({served})"
        self._broken = ""
        """Why it cannot generate; empty when it can."""
        self.weight_version = self._newest_version = self._first_version()
        self.sync = make_sync(self.clients, served)
        self._generation_lock = ReadersWriterLock()
        self._closed = False
        self._paused = False
        if self.weight_version == 0 and lacks_its_head(self.shape):
            self._broken = "SGLang does not load the tied output head of this checkpoint"
        elif not self._broken:
            self._probe([str(info.version) for info in infos])

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_result: Callable[[GenerationResult], None] | None = None,
    ) -> list[GenerationResult]:
        """See `RolloutEngine.generate` and `ServerPool.generate`.

        Waits while the engine is paused or its weights are being updated.
        """
        for request in requests:
            check_request(request, self.shape, self.context_length)
        async with self._generation_lock.reading():
            self._check_usable()
            return await self.pool.generate(
                requests, version=self.weight_version, newest=lambda: self._newest_version, on_result=on_result
            )

    async def score(
        self, responses: Sequence[tuple[np.ndarray, np.ndarray]], temperature: float
    ) -> list[ScoredResponse]:
        """See `RolloutEngine.score`: by the first server that serves, log-probs alone.

        SGLang 0.5.23 scores a prompt at temperature 1, whatever temperature it is given.
        """
        if temperature != 1.0:
            return [ScoredResponse(None)] * len(responses)
        async with self._generation_lock.reading():
            self._check_usable()
            client = self.pool.membership.serving[0].client
            return [
                ScoredResponse(await asyncio.to_thread(client.score, prompt.tolist(), response.tolist()))
                for prompt, response in responses
            ]

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, *, in_place: bool = False
    ) -> str:
        """See `RolloutEngine.update_weights`. Waits for running requests; new ones wait for the update.

        With `in_place` running requests are not waited for: they stand still meanwhile, and go on with the new weights
        and the old cache. Their tokens carry the version they were drawn under.

        Every server that is ready takes part, those that had failed as well, and serves again afterwards. After a
        failure the engine refuses to generate until an update succeeds. Where no server is up, one that is gone is
        waited for.
        """
        with self._generation_lock.write(self.clients[0].request_timeout_s + 30, wait=not in_place):
            if self._closed:
                raise UserError("is closed", where=self.description)
            membership = self.pool.membership
            members = membership.candidates() or membership.wait_for_candidates()
            anew = membership.join(members)
            self._broken = f"the weights of version {version} did not arrive whole"
            try:
                clients = [server.client for server in members]
                if anew or clients != self.sync.clients:
                    self.sync.set_servers(clients)
                self._newest_version = version
                digest = self.sync.update(named_tensors, version, resume=not self._paused, in_place=in_place)
            except UserError as error:
                failed = membership.remove_failed(error, members)
                others = any(server not in failed for server in members)
                if failed and (others or membership.may_come_back(failed)):
                    raise WeightsNeeded(
                        f"the update to version {version} failed there ({error.what}) and is to be made again",
                        where=", ".join(f"server {server.url}" for server in failed),
                        faults=faults_of(error),
                    ) from error
                raise
            self.pool.admit(members)
            self._broken = "the servers' cache is released" if self.sync.lacks_memory else ""
            self.weight_version = version
            return digest

    def release_memory(self) -> int:
        """See `RolloutEngine.release_memory`. Waits for running requests, and for a server that is starting.

        Every server that is up is asked, in or out of service: each holds its share. Raises its `ServerFault` where one
        refuses and stays up; what has ended holds nothing.
        """
        with self._generation_lock.write(self.clients[0].request_timeout_s + 30):
            self._broken = "the servers' memory is released"
            if self._starts is not None:
                self._starts.acquire(self._start_timeout_s)
            up = self.pool.membership.up()
            failed = self._out_of_service_where_fails(self.sync.release_memory, up)
            if failed:
                still_up = self.pool.membership.up()
                for server, fault in failed.items():
                    if server in still_up:
                        raise fault
            return len(up) - len(failed)

    def resume_memory(self) -> None:
        """See `RolloutEngine.resume_memory`. A server that fails it is out of service until the next update."""
        with self._generation_lock.write(self.clients[0].request_timeout_s + 30):
            resume = not self._paused
            self._out_of_service_where_fails(
                lambda client: self.sync.resume_memory(client, resume=resume), self.pool.membership.serving
            )
            self._broken = ""
            if self._starts is not None:
                self._starts.release()

    def await_server(self) -> None:
        """See `RolloutEngine.await_server`. Raises as `Membership.wait_for_candidates`."""
        if self._starts is not None:
            self._starts.release()
        self.pool.membership.wait_for_candidates()
        self.release_memory()

    def metrics(self) -> dict[str, float]:
        """See `pool.metrics`."""
        return self.pool.metrics()

    async def pause(self) -> None:
        """End running requests as 'abort' and hold new ones back; returns when all have ended."""
        self._paused = True
        self._generation_lock.block_readers()
        self.pool.stop_dispatch()
        await asyncio.to_thread(self._control, SGLangClient.pause)
        await self.pool.wait_until_idle()

    async def resume(self) -> None:
        """Let requests run again."""
        if not self._broken:
            await asyncio.to_thread(self._control, SGLangClient.resume)
        self._paused = False
        self.pool.resume_dispatch()
        self._generation_lock.admit_readers()

    def _control(self, method: Callable[[SGLangClient], None]) -> None:
        """`method` for every server that serves; one that fails it counts as gone, so that its calls end."""
        serving = self.pool.membership.serving
        for server, fault in self._faults(method, serving).items():
            self.pool.membership.take_out_of_service(server, ServerGone.of(fault, server.url))

    def _out_of_service_where_fails(
        self, method: Callable[[SGLangClient], None], servers: Sequence[PooledServer]
    ) -> dict[PooledServer, ServerFault]:
        """`method` for these; those that fail it serve no more, and are returned with their faults."""
        faults = self._faults(method, servers)
        for server, fault in faults.items():
            self.pool.membership.take_out_of_service(server, fault)
        return faults

    def _faults(
        self, method: Callable[[SGLangClient], None], servers: Sequence[PooledServer]
    ) -> dict[PooledServer, ServerFault]:
        """`method` for these servers, side by side: those that failed it, and how."""

        def attempt(client: SGLangClient) -> ServerFault | None:
            try:
                method(client)
            except ServerFault as fault:
                return fault
            return None

        answers = zip(servers, self.pool.on_all(attempt, servers), strict=True)
        return {server: fault for server, fault in answers if fault is not None}

    async def health(self) -> bool:
        """Whether some server serves, and all that serve are ready (a paused engine's servers are not asked)."""
        if self._closed or self._broken or not self.pool.membership.serving:
            return False
        return self._paused or all(await asyncio.to_thread(self.pool.on_all, SGLangClient.is_ready))

    def close(self) -> None:
        """Leave the weight group; the servers run on. Idempotent."""
        if not self._closed:
            self._closed = True
            self.sync.close()
            self.pool.close()
            if self._starts is not None:
                self._starts.release()

    def _check_usable(self) -> None:
        if self._closed:
            raise UserError("is closed", where=self.description)
        if self._broken:
            fix = "update the weights again before generating, or restart the servers"
            raise UserError(self._broken, where=self.description, fix=fix)

    def _first_version(self) -> int:
        """The servers' common version; one that is not a number is a server's untouched checkpoint, and becomes 0.

        Where they have none in common, or one was left in the middle of an update, nothing is generated before another.
        """
        versions = dict(zip(self.pool.servers, self.pool.on_all(SGLangClient.weight_version), strict=True))
        for server, version in versions.items():
            if version == UNKNOWN_VERSION:
                self._broken = f"server {server.url} was left in the middle of a weight update"
            elif not version.isdigit():
                server.client.call("/update_weight_version", {"new_version": "0", "abort_all_requests": False})
                versions[server] = "0"
        if self._broken:
            return 0
        found = sorted({int(version) for version in versions.values()})
        if len(found) > 1:
            self._broken = f"the servers hold weight versions {found}"
        return found[0]

    def _probe(self, versions: Sequence[str]) -> None:
        """One token from each server: a flag that brings no routes must not be noticed after the first rollout."""

        async def ask(client: SGLangClient) -> None:
            request = GenerationRequest("probe", (0,), SamplingParams(max_new_tokens=1))
            async with open_session() as session:
                await client.generate(session, [request])

        async def ask_all() -> None:
            answers = await asyncio.gather(*(ask(client) for client in self.clients), return_exceptions=True)
            faults = []
            for answer, version in zip(answers, versions, strict=True):
                if isinstance(answer, ServerFault):
                    faults.append(foreign(answer, version))
                elif isinstance(answer, BaseException):
                    raise answer
            if faults:
                raise as_one_error(faults)

        failure: list[BaseException] = []

        def run() -> None:  # its own thread: the caller may be inside an event loop
            try:
                asyncio.run(ask_all())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]


def _refuse_unless_ready(client: SGLangClient) -> None:
    if not client.is_ready():
        raise ServerFault(
            "is not ready: it starts, or is paused in the middle of somebody's weight update",
            url=client.url,
            fix="wait for its trainer; where that was killed, train with it again or restart it",
        )


if TYPE_CHECKING:
    _: type[RolloutEngine] = SGLangEngine
