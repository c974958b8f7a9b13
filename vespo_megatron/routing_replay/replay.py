"""Recording, replay and counting of expert routes on live routers, through megatron-core's `RouterReplay` hook.

megatron-core calls `router.router_replay.get_replay_topk(...)` where a router would take its top-k. Upstream's object
keeps one global list in construction order, the last recording only, and a backward queue that only recompute drains
(router_replay.py:26, 94, 88). Here one `RouteReplay` per policy owns a `LayerReplay` per router, found by walking the
live model and known by its layer number; it serves each router the micro-batch at hand, and counts: how often each
router used it, and in training how many tokens each expert got.

Which micro-batch is at hand: inside `forward(...)` the one named there; outside, in a backward with activation
recompute, the oldest whose forward this router has seen and not yet recomputed, since every schedule runs a chunk's
backwards in the order of its forwards.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer

from vespo_megatron.errors import UserError
from vespo_megatron.routing_replay.load import ExpertLoad
from vespo_megatron.routing_replay.router_scores import router_log_probs
from vespo_megatron.routing_replay.table import RouteTable

Chosen = tuple[torch.Tensor, torch.Tensor]
"""Scores and indices of the experts a router chose, both [rows, topk]."""


class DecoderChunk(Protocol):
    """What is needed of a model chunk."""

    decoder: TransformerBlock


class ComputeTopK(Protocol):
    """A router's own choice: megatron-core's top-k."""

    def __call__(
        self, scores: torch.Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
    ) -> Chosen: ...


class RouterWatcher(Protocol):
    """Who looks at the routers in a forward."""

    def see(self, column: int, log_probs: torch.Tensor, experts: torch.Tensor, /) -> None:
        """A layer's log-probs [rows, experts], and the experts [rows, topk] that the tokens are sent to."""


@dataclass
class _InFlight:
    """One micro-batch from its forward to its backward."""

    table: RouteTable
    """Written to when recording, read when replaying."""
    experts: torch.Tensor
    """The table on the device, when replaying: [rows, layers, topk]; else empty."""
    live_rows: torch.Tensor | None = None
    """int64 [n] on the device; None: there are none."""
    observed: RouteTable | None = None
    """Where to write what the routers choose themselves; None: nobody wants to know."""
    chosen: dict[int, torch.Tensor] = field(default_factory=dict)
    """Column → [rows, topk], to be written at the end of the forward."""

    def write_back(self) -> None:
        """Write what was chosen to `observed`: one copy to the host for all layers of the chunk."""
        if self.chosen and self.observed is not None:
            stacked = torch.stack(list(self.chosen.values()), dim=1).to(torch.int32).cpu().numpy()
            self.observed.experts[:, list(self.chosen)] = stacked
            self.chosen = {}


class LayerReplay(RouterReplay):
    """One router's hook; not registered in megatron-core's global list."""

    def __init__(self, owner: RouteReplay, chunk: int, column: int, layer_number: int) -> None:
        self.owner, self.chunk, self.column, self.layer_number = owner, chunk, column, layer_number
        self.forwards = self.recomputes = 0
        self.pending: deque[_InFlight] = deque()

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: ComputeTopK | None = None,
    ) -> Chosen:
        """Called by the router in place of its own top-k."""
        if default_compute_topk is None:
            raise TypeError("default_compute_topk is None: megatron-core's routers give their own top-k")
        choose = partial(default_compute_topk, scores, topk, num_groups=num_groups, group_topk=group_topk)
        return self.owner.route(self, scores, choose)


class RouteReplay:
    """Recording and replay for every router of this rank's model chunks.

    Args:
        chunks: unwrapped models.
        recomputes: whether activation recompute runs the routers again in the backward.
        num_experts: of a layer.
        counts_load: whether passes with a backward count each expert's tokens.

    Raises:
        UserError: a router computes its top-k in a way that passes the hook by.
    """

    def __init__(
        self, chunks: Sequence[DecoderChunk], *, recomputes: bool, num_experts: int, counts_load: bool
    ) -> None:
        self.recomputes, self.num_experts, self.counts_load = recomputes, num_experts, counts_load
        self.hooks: list[LayerReplay] = []
        self.routers: list[TopKRouter] = []
        """Of each column."""
        for index, chunk in enumerate(chunks):
            layers: Sequence[TransformerLayer] = chunk.decoder.layers
            for layer in sorted(layers, key=lambda layer: layer.layer_number):
                if not isinstance(layer.mlp, MoELayer):
                    continue  # a dense layer
                router = layer.mlp.router
                if getattr(router.config, "moe_router_fusion", False):
                    raise UserError(
                        f"layer {layer.layer_number} fuses its router",
                        where="moe_router_fusion",
                        expected="false with policy.router_replay: the fused kernel does not ask for replayed routes",
                    )
                hook = LayerReplay(self, index, len(self.hooks), layer.layer_number)
                router.router_replay = hook
                self.hooks.append(hook)
                self.routers.append(router)
        self._mode = "off"
        self._current: _InFlight | None = None
        self._chunk = -1
        self.load: ExpertLoad | None = None
        """Of the last pass with a backward; None where nothing is counted."""
        self._counting: ExpertLoad | None = None
        self._is_real: torch.Tensor | None = None
        self._watcher: RouterWatcher | None = None

    @property
    def layer_numbers(self) -> list[int]:
        """Global layer number (from 1) of each column of this rank's tables."""
        return [hook.layer_number for hook in self.hooks]

    @contextlib.contextmanager
    def running(self, mode: str, *, micro_batches: int, backward: bool, device: torch.device) -> Iterator[None]:
        """One pass over `micro_batches` micro-batches: mode 'off', 'record' or 'replay'.

        At the end every router must have used every micro-batch once, and once more where the backward recomputes;
        whatever happens, state is reset.

        Raises:
            UserError: routes were not used, or used twice.
        """
        self._reset()
        self._mode = mode
        if backward:
            self.load = ExpertLoad(len(self.hooks), self.num_experts, device) if self.counts_load else None
            self._counting = self.load
        try:
            yield
            if mode != "off":
                self._check_counts(micro_batches, micro_batches if backward and self.recomputes else 0)
        finally:
            self._reset()

    @contextlib.contextmanager
    def forward(
        self,
        chunk: int,
        table: RouteTable | None,
        observed: RouteTable | None,
        device: torch.device,
        is_real: torch.Tensor,
        watcher: RouterWatcher | None = None,
    ) -> Iterator[None]:
        """The forward of one micro-batch through one model chunk.

        Args:
            chunk: index of the model chunk.
            table: what is recorded into or replayed.
            observed: takes what the routers would choose.
            device: where the model is.
            is_real: bool [rows], False for padding, which is nobody's load.
            watcher: shown every router's log-probs and where it sends the tokens.
        """
        if self._mode != "off":
            self._current = self._in_flight(table, observed, device)
        self._chunk, self._is_real, self._watcher = chunk, is_real, watcher
        try:
            yield
            if self._current is not None:
                self._current.write_back()
        finally:
            self._current, self._chunk, self._is_real, self._watcher = None, -1, None, None

    def _in_flight(self, table: RouteTable | None, observed: RouteTable | None, device: torch.device) -> _InFlight:
        if table is None:
            raise UserError("has no routes", where="micro-batch", expected=f"a route table to {self._mode}")
        if self._mode == "record":
            return _InFlight(table, torch.empty(0), observed=table)
        # One copy per micro-batch; the layers read columns of it without waiting for anything.
        experts = torch.from_numpy(table.experts).to(device, non_blocking=True)
        live = torch.from_numpy(table.live_rows.astype("int64")).to(device, non_blocking=True)
        return _InFlight(table, experts, live if len(live) else None, observed)

    def route(self, hook: LayerReplay, scores: torch.Tensor, choose: Callable[[], Chosen]) -> Chosen:
        """The (values, indices) [rows, topk] a router gets instead of its own top-k."""
        values, indices = choose() if self._mode == "off" else self._recorded_or_replayed(hook, scores, choose)
        if self._counting is not None and self._is_real is not None:  # None in the backward: counted already
            self._counting.add(hook.column, indices, self._is_real)
        if self._watcher is not None:
            self._watcher.see(hook.column, router_log_probs(scores, self.routers[hook.column]), indices)
        return values, indices

    def _recorded_or_replayed(self, hook: LayerReplay, scores: torch.Tensor, choose: Callable[[], Chosen]) -> Chosen:
        if self._current is not None:
            batch = self._current
            hook.forwards += 1
            if hook.chunk != self._chunk:
                raise UserError(
                    f"the router of layer {hook.layer_number} ran in model chunk {self._chunk}",
                    where="routing replay",
                    expected=f"chunk {hook.chunk}, where it was found",
                )
            if self.recomputes:
                hook.pending.append(batch)
        else:
            if not hook.pending:
                raise UserError(
                    f"layer {hook.layer_number} asks for routes more often than it ran forward",
                    where="routing replay",
                    expected="one recomputation per micro-batch",
                )
            batch = hook.pending.popleft()
            hook.recomputes += 1
        rows = len(batch.table.experts)
        if scores.shape[0] != rows:
            raise UserError(
                f"layer {hook.layer_number} routes {scores.shape[0]} tokens",
                where="routing replay",
                expected=f"{rows}, the rows of its route table",
            )
        if self._mode == "record":
            values, indices = choose()
            if batch is self._current:
                batch.chosen[hook.column] = indices
            return values, indices
        indices = batch.experts[:, hook.column].long()
        observe = batch is self._current and batch.observed is not None
        if batch.live_rows is not None or observe:
            own = choose()[1]
            if observe:
                batch.chosen[hook.column] = own
            if batch.live_rows is not None:
                indices = indices.index_copy(0, batch.live_rows, own.index_select(0, batch.live_rows))
        return scores.gather(1, indices), indices

    def _check_counts(self, forwards: int, recomputes: int) -> None:
        left = forwards - recomputes if self.recomputes else 0
        for hook in self.hooks:
            if (hook.forwards, hook.recomputes, len(hook.pending)) != (forwards, recomputes, left):
                raise UserError(
                    f"layer {hook.layer_number} used {hook.forwards} route tables forward and {hook.recomputes} again "
                    "in the backward",
                    where="routing replay",
                    expected=f"{forwards} and {recomputes}: each exactly once",
                )

    def _reset(self) -> None:
        self._mode, self._current, self._chunk = "off", None, -1
        self._counting = self._is_real = self._watcher = None
        for hook in self.hooks:
            hook.forwards = hook.recomputes = 0
            hook.pending.clear()
