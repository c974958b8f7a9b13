"""`SGLangEngine`: the `RolloutEngine` over one or more SGLang servers, by HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rollout_sglang.client import SGLangClient
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult, SamplingParams
from vespo_megatron.rollout_sglang.model_shape import ModelShape
from vespo_megatron.rollout_sglang.reply import check_request
from vespo_megatron.rollout_sglang.server_flags import context_length
from vespo_megatron.rollout_sglang.weight_sync import WeightSync

if TYPE_CHECKING:
    import torch

_CALL_SIZE = 16
"""Requests in one HTTP call at most: enough to hide the call's cost, few enough that results arrive as they finish."""


def connect(recipe: Recipe, urls: Sequence[str], *, device: str | None = None) -> SGLangEngine:
    """An engine over servers that run; asks each what it is and probes it with one token.

    Args:
        device: where the trainer's weights are, "cuda" or "cpu"; None follows the servers.

    Raises `UserError` for a server that cannot be reached, serves another context or model, or returns no routes
    though the recipe wants them.
    """
    config = recipe.policy.generation.sglang_cfg
    if config.weight_transport != "distributed":
        raise UserError(
            f"weight_transport {config.weight_transport!r} is not available yet",
            where="policy.generation.sglang_cfg.weight_transport",
            fix="set it to distributed",
        )
    if not urls:
        raise UserError("no server", where="policy.generation.sglang_cfg.urls", fix="launch servers or give their URLs")
    shape = ModelShape.from_folder(recipe.policy.model_name)
    shape.check_served_by_sglang(recipe.policy.model_name)
    context = context_length(recipe, shape)
    clients = [
        SGLangClient(
            url,
            shape,
            context_length=context,
            return_routes=config.enable_return_routed_experts,
            request_timeout_s=config.request_timeout,
            keep_bad_numbers=recipe.loss_fn.on_bad_sample == "drop",
        )
        for url in urls
    ]
    return SGLangEngine(
        clients, device=device, bucket_bytes=config.weight_bucket_bytes, max_concurrent=config.max_concurrent_requests
    )


class SGLangEngine:
    """See `RolloutEngine`. One weight update at a time; generation may run from any event loop.

    Args:
        clients: one per server, all of the same model.
        device: "cuda" or "cpu", of the weight buckets; None is what the servers report.
        bucket_bytes: size of one weight bucket.
        max_concurrent: requests in flight per server.
    """

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        *,
        device: str | None = None,
        bucket_bytes: int = 2**28,
        max_concurrent: int = 1024,
    ) -> None:
        self.clients = list(clients)
        self.shape, self.context_length = self.clients[0].shape, self.clients[0].context_length
        infos = [client.server_info() for client in self.clients]
        for client, info in zip(self.clients, infos, strict=True):
            _check_server(client, info)
        served = infos[0].get("device", "cuda")
        self.description = f"SGLang {infos[0]['version']} at {', '.join(c.url for c in self.clients)} ({served})"
        self.weight_version = self._first_version()
        self.max_concurrent = max_concurrent
        self.sync = WeightSync(self.clients, device=device or served, bucket_bytes=bucket_bytes)
        self._gate = _Gate()
        self._in_flight = dict.fromkeys(range(len(self.clients)), 0)
        self._closed = False
        self._broken = ""
        self._paused = False
        if self.shape.tie_word_embeddings and self.weight_version == 0:
            # SGLang 0.5.23 gives a Qwen3-MoE a head of its own and finds nothing for it in a tied checkpoint.
            self._broken = "SGLang does not load the tied output head of this checkpoint"
        else:
            self._probe()

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_result: Callable[[GenerationResult], None] | None = None,
    ) -> list[GenerationResult]:
        """See `RolloutEngine.generate`. A group goes to one server in one call (or several of at most 16 requests).

        Waits while the engine is paused or its weights are being updated. The first failure ends the rest.
        """
        import aiohttp

        for request in requests:
            check_request(request, self.shape, self.context_length)
        await self._gate.enter()
        try:
            self._check_usable()
            results: dict[int, GenerationResult] = {}
            slots = asyncio.Condition()
            connector = aiohttp.TCPConnector(limit=0, force_close=False)
            async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as tasks:
                for indices in split_calls(requests, _CALL_SIZE):
                    tasks.create_task(self._call(session, requests, indices, slots, results, on_result))
        except BaseExceptionGroup as group:
            raise _first_error(group) from None
        finally:
            self._gate.leave()
        return [results[index] for index in range(len(requests))]

    async def _call(
        self,
        session: object,
        requests: Sequence[GenerationRequest],
        indices: list[int],
        slots: asyncio.Condition,
        results: dict[int, GenerationResult],
        on_result: Callable[[GenerationResult], None] | None,
    ) -> None:
        async with slots:
            await slots.wait_for(lambda: self._free_server(len(indices)) is not None)
            server = self._free_server(len(indices))
            self._in_flight[server] += len(indices)
        try:
            client = self.clients[server]
            answers = await client.generate(session, [requests[index] for index in indices])
        finally:
            self._in_flight[server] -= len(indices)
            async with slots:
                slots.notify_all()
        for index, result in zip(indices, answers, strict=True):
            if (result.weight_versions != self.weight_version).any():
                raise UserError(
                    f"answered with weight version {result.weight_versions.tolist()[0]}",
                    where=f"server {client.url}, request {result.request_id}",
                    expected=f"version {self.weight_version}",
                    fix="it was restarted or updated by someone else: update the weights again",
                )
            results[index] = result
            if on_result is not None:
                on_result(result)

    def _free_server(self, count: int) -> int | None:
        """The least loaded server, None while even that one is full (a call larger than the limit goes alone)."""
        server = min(self._in_flight, key=self._in_flight.__getitem__)
        load = self._in_flight[server]
        return server if load == 0 or load + count <= self.max_concurrent else None

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        """See `RolloutEngine.update_weights`. Waits for running requests; new ones wait for the update.

        After a failure the engine refuses to generate until an update succeeds.
        """
        with self._gate.exclusive(self.clients[0].request_timeout_s + 30):
            if self._closed:
                raise UserError("is closed", where=self.description)
            self._broken = f"the weights of version {version} did not arrive whole"
            digest = self.sync.update(named_tensors, version, resume=not self._paused)
            self._broken = ""
            self.weight_version = version
            return digest

    async def pause(self) -> None:
        """End running requests as 'abort' and hold new ones back."""
        self._paused = True
        self._gate.close()
        await asyncio.gather(*(asyncio.to_thread(client.pause) for client in self.clients))

    async def resume(self) -> None:
        """Let requests run again."""
        if not self._broken:
            await asyncio.gather(*(asyncio.to_thread(client.resume) for client in self.clients))
        self._paused = False
        self._gate.open()

    async def health(self) -> bool:
        """Whether every server answers and holds whole weights (a paused engine's servers are not asked)."""
        if self._closed or self._broken:
            return False
        if self._paused:
            return True
        return all(await asyncio.gather(*(asyncio.to_thread(client.is_ready) for client in self.clients)))

    def close(self) -> None:
        """Leave the weight group; the servers run on. Idempotent."""
        if not self._closed:
            self._closed = True
            self.sync.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise UserError("is closed", where=self.description)
        if self._broken:
            raise UserError(self._broken, where=self.description, fix="update the weights again before generating")

    def _first_version(self) -> int:
        """The servers' common version; one that is not a number is a server's untouched checkpoint, and becomes 0."""
        versions = set()
        for client in self.clients:
            version = str(client.model_info().get("weight_version"))
            if not version.isdigit():
                client.call("/update_weight_version", {"new_version": "0", "abort_all_requests": False})
                version = "0"
            versions.add(int(version))
        if len(versions) > 1:
            raise UserError(f"the servers hold weight versions {sorted(versions)}", where=self.description,
                            expected="one", fix="restart them")  # fmt: skip
        return versions.pop()

    def _probe(self) -> None:
        """One token from each server: a flag that brings no routes must not be noticed after the first rollout."""

        async def ask(client: SGLangClient) -> None:
            import aiohttp

            request = GenerationRequest("probe", (0,), SamplingParams(max_new_tokens=1))
            async with aiohttp.ClientSession() as session:
                await client.generate(session, [request])

        async def ask_all() -> None:
            await asyncio.gather(*(ask(client) for client in self.clients))

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


class _Gate:
    """Many generations or one weight update; and none of the former while closed. For threads and event loops."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside, self._updating, self._closed = 0, False, False

    async def enter(self) -> None:
        while True:
            with self._condition:
                if not self._updating and not self._closed:
                    self._inside += 1
                    return
            await asyncio.sleep(0.005)

    def leave(self) -> None:
        with self._condition:
            self._inside -= 1
            self._condition.notify_all()

    def close(self) -> None:
        with self._condition:
            self._closed = True

    def open(self) -> None:
        with self._condition:
            self._closed = False

    @contextmanager
    def exclusive(self, timeout_s: float) -> Iterator[None]:
        """Alone inside; raises `UserError` when another update is under way or generation does not end in time."""
        with self._condition:
            if self._updating:
                raise UserError("a weight update is already under way", where="rollout engine")
            self._updating = True
        try:
            with self._condition:
                if not self._condition.wait_for(lambda: self._inside == 0, timeout_s):
                    raise UserError(f"generation did not end within {timeout_s:g} s", where="rollout engine")
            yield
        finally:
            with self._condition:
                self._updating = False


def split_calls(requests: Sequence[GenerationRequest], size: int) -> Iterator[list[int]]:
    """Indices of `requests` in calls of at most `size`; a group is never mixed with another, nor torn without need."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.group_id or f"\0{request.request_id}", []).append(index)
    for indices in groups.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _check_server(client: SGLangClient, info: dict) -> None:
    where = f"server {client.url}"
    allowed = info.get("context_length")
    if allowed is not None and allowed < client.context_length:
        raise UserError(f"serves a context of {allowed} tokens", where=where, expected=f"{client.context_length}",
                        fix="restart it with --context-length")  # fmt: skip
    if client.return_routes and not info.get("enable_return_routed_experts", True):
        raise UserError("returns no routes", where=where, fix="restart it with --enable-return-routed-experts")
    if info.get("dp_size", 1) != 1 or info.get("pp_size", 1) != 1:
        raise UserError("has data- or pipeline-parallel replicas", where=where, expected="tensor parallel alone")


def _first_error(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = next((inner for inner in error.exceptions if isinstance(inner, UserError)), error.exceptions[0])
    return error
