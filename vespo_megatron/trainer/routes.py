"""What each pass of a step does with routes, and the agreement it measures on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from vespo_megatron.megatron.micro_batch import MicroBatch
from vespo_megatron.megatron.parallel import RankInfo, pipeline_group
from vespo_megatron.megatron.policy import LIVE, MegatronPolicy, RouteUse
from vespo_megatron.routing_replay.agreement import Agreement
from vespo_megatron.routing_replay.router_scores import RouterScores
from vespo_megatron.routing_replay.table import RouteTable, row_versions

_RoutePair = tuple[MicroBatch, RouteTable | None, RouteTable | None]


class StepRoutes:
    """Routes of one rollout batch on this rank.

    R2 records in the log-prob pass at θ_old and replays that in every update. Where there is a pass per weight version
    (`behavior: version`), a token's routes are those of the version that drew it. R3 replays the engine's routes in
    every pass. Without replay, the first pass over the data records what the trainer chose, if the engine's routes are
    there to compare with.

    With `shift` (`loss_fn.router_shift`) the routers of π_old are recorded too, and those of π_θ compared with them.
    """

    def __init__(
        self,
        mode: str,
        policy: MegatronPolicy,
        micro_batches: Sequence[MicroBatch],
        measure: bool,
        *,
        shift: bool = False,
    ) -> None:
        self.mode, self.policy, self.rank_info = mode, policy, policy.rank_info
        self.has_engine_routes = all(each.engine_routes is not None for each in micro_batches)
        self.measure = measure and (self.has_engine_routes or mode == "R2")
        self.engine, self.drift = Agreement(), Agreement()
        self.shift = shift
        self._observed: dict[int, RouteTable] = {}
        self._of_version: dict[int, RouteTable] = {}
        """Of a pass under one of several weight versions, by micro-batch: what the routers chose."""
        self._scores_of_version: dict[int, RouterScores] = {}
        """Of the same, by micro-batch."""

    @property
    def needs_log_prob_pass(self) -> bool:
        """R2 records there, whatever the objective needs."""
        return self.mode == "R2"

    def log_prob_pass(self) -> RouteUse:
        """At θ_old, before any update."""
        return replace(self._log_prob_pass(), scores=self._record_scores)

    def _log_prob_pass(self) -> RouteUse:
        if self.mode == "R3":
            return RouteUse("replay", lambda each: (each.engine_routes, self._observe(each)))
        if self.mode == "R2" or (self.measure and self.has_engine_routes):
            return RouteUse("record", lambda each: (self._record(each), None))
        return LIVE

    def version_pass(self, version: int) -> RouteUse:
        """As `log_prob_pass`, under one of several weight versions; `after_version_pass` follows.

        R3 leaves a response's rows of earlier versions to the router: the engine ran what these had drawn again under
        this one, and its routers chose again.
        """
        return replace(self._version_pass(version), scores=self._version_scores)

    def _version_pass(self, version: int) -> RouteUse:
        whole = self._log_prob_pass()
        if whole.mode == "record":
            return RouteUse("record", lambda each: (self._version_table(each), None))
        if whole.mode == "replay":
            return RouteUse("replay", lambda each: (_of_version(each, version), self._version_table(each)))
        return whole

    def after_version_pass(self, micro_batches: Sequence[MicroBatch], version: int) -> None:
        """Keep the routes of tokens that this version drew; rows of no token are the first pass's."""
        for each in micro_batches:
            self._keep_scores(each, version)
            chosen = self._of_version.pop(id(each), None)
            if chosen is None:
                continue
            known = self._observed if self.mode == "R3" else None
            first = each.trainer_routes is None if known is None else id(each) not in known
            table = self._record(each) if known is None else self._observe(each)
            if table is None:
                raise RuntimeError("routes that nobody measures were observed")
            versions = _versions_of_rows(each)
            rows = np.full(len(versions), True) if first else versions == version
            table.experts[rows] = chosen.experts[rows]

    def update_pass(self, *, first: bool) -> RouteUse:
        """An optimizer update; `first` is true for the first mini-batch when no log-prob pass has been run."""
        # With several pipeline stages a forward before the update has measured it.
        measures = self.shift and self.rank_info.pipeline_size == 1
        return replace(self._update_pass(first=first), measures_shift=measures)

    def _update_pass(self, *, first: bool) -> RouteUse:
        if self.mode == "R2":
            return RouteUse("replay", lambda each: (each.trainer_routes, self._observe(each)))
        if self.mode == "R3":
            return RouteUse("replay", lambda each: (each.engine_routes, self._observe(each) if first else None))
        if first and self.measure and self.has_engine_routes:
            return RouteUse("record", lambda each: (self._record(each), None))
        return LIVE

    def extra_pass(self) -> RouteUse:
        """A pass without gradient between updates: replayed as they are, nothing recorded."""
        return replace(self._extra_pass(), measures_shift=self.shift)

    def _extra_pass(self) -> RouteUse:
        if self.mode == "R2":
            return RouteUse("replay", lambda each: (each.trainer_routes, None))
        if self.mode == "R3":
            return RouteUse("replay", lambda each: (each.engine_routes, None))
        return LIVE

    def _record(self, micro_batch: MicroBatch) -> RouteTable:
        if micro_batch.trainer_routes is None:  # model chunks of one rank share the table
            micro_batch.trainer_routes = self.policy.empty_routes(micro_batch)
        return micro_batch.trainer_routes

    def _observe(self, micro_batch: MicroBatch) -> RouteTable | None:
        if not self.measure:
            return None
        if id(micro_batch) not in self._observed:  # model chunks of one rank share the table
            self._observed[id(micro_batch)] = self.policy.empty_routes(micro_batch)
        return self._observed[id(micro_batch)]

    def _version_table(self, micro_batch: MicroBatch) -> RouteTable | None:
        if self.mode == "R3" and not self.measure:
            return None
        if id(micro_batch) not in self._of_version:  # model chunks of one rank share the table
            self._of_version[id(micro_batch)] = self.policy.empty_routes(micro_batch)
        return self._of_version[id(micro_batch)]

    def _record_scores(self, micro_batch: MicroBatch) -> RouterScores | None:
        if self.shift and micro_batch.router_scores is None:  # model chunks of one rank share the table
            micro_batch.router_scores = self.policy.empty_router_scores(micro_batch)
        return micro_batch.router_scores if self.shift else None

    def _version_scores(self, micro_batch: MicroBatch) -> RouterScores | None:
        if not self.shift:
            return None
        if id(micro_batch) not in self._scores_of_version:  # model chunks of one rank share the table
            self._scores_of_version[id(micro_batch)] = self.policy.empty_router_scores(micro_batch)
        return self._scores_of_version[id(micro_batch)]

    def _keep_scores(self, micro_batch: MicroBatch, version: int) -> None:
        """Of tokens that this version drew; rows of no token are the first pass's."""
        scores = self._scores_of_version.pop(id(micro_batch), None)
        if micro_batch.router_scores is None:
            micro_batch.router_scores = scores
        elif scores is not None:
            micro_batch.router_scores.take(_versions_of_rows(micro_batch) == version, scores)

    def after_log_probs(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Compare the engine with the trainer at θ_old."""
        self._compare_with_engine(micro_batches)

    def after_update(self, micro_batches: Sequence[MicroBatch], *, first: bool) -> None:
        """Compare θ_old with θ (R2), or engine with trainer where this was the first pass over the data."""
        if first:
            self._compare_with_engine(micro_batches)
        elif self.mode == "R2" and self.measure:
            pairs = [(each, each.trainer_routes, self._observed.get(id(each))) for each in micro_batches]
            self._count(self.drift, pairs)
        self._observed.clear()

    def _compare_with_engine(self, micro_batches: Sequence[MicroBatch]) -> None:
        if not (self.measure and self.has_engine_routes):
            return
        pairs = []
        for each in micro_batches:
            own = self._observed.get(id(each)) if self.mode == "R3" else each.trainer_routes
            pairs.append((each, each.engine_routes, own))
        self._count(self.engine, pairs)
        self._observed.clear()

    def _count(self, agreement: Agreement, pairs: Sequence[_RoutePair]) -> None:
        """Compare two tables of each micro-batch, where both hold a token's routes."""
        layers = self.policy.replay.layer_numbers
        parts = [np.zeros(0, dtype=bool)]
        for micro_batch, one, other in pairs:
            if one is None or other is None:
                raise RuntimeError("routes that are compared were not recorded")
            rows = micro_batch.layout.is_real[micro_batch.layout.sequence_parallel_slice]
            rows = rows if one.recorded is None else rows & one.recorded
            parts.append(agreement.add(layers, one.experts[rows], other.experts[rows]))
        differs = np.concatenate(parts)
        if self.rank_info.pipeline_size > 1:  # a token differs when it does in any stage's layers
            anywhere = torch.from_numpy(differs.astype(np.uint8)).to(self.rank_info.device)
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=pipeline_group())
            differs = anywhere.cpu().numpy().astype(bool)
        if self.rank_info.pipeline_rank == 0:
            agreement.add_tokens(differs)


def _versions_of_rows(micro_batch: MicroBatch) -> np.ndarray:
    """int64 [rows]: the version whose routers are those of each row's log-prob; −1 of no token."""
    return micro_batch.layout.router_rows([row_versions(sample) for sample in micro_batch.batch.samples], -1)


def _of_version(micro_batch: MicroBatch, version: int) -> RouteTable | None:
    """The engine's routes, without what a response that goes on under this version had of earlier ones."""
    table = micro_batch.engine_routes
    if table is None:
        return None
    samples = micro_batch.batch.samples
    ran_again = [(row_versions(each) < version) & (each.weight_versions == version).any() for each in samples]
    rows = np.flatnonzero(micro_batch.layout.router_rows(ran_again, False))
    return RouteTable(table.experts, np.union1d(table.live_rows, rows).astype(np.int32))


def route_metrics(reports: Sequence[tuple[Agreement, Agreement, int, int]]) -> dict[str, float]:
    """From every rank's (engine agreement, drift agreement, route bytes, tokens) to metrics."""
    metrics = Agreement.sum(report[0] for report in reports).metrics("routes/")
    metrics |= Agreement.sum(report[1] for report in reports).metrics("routes/drift_")
    held, tokens = sum(report[2] for report in reports), sum(report[3] for report in reports)
    if held:
        metrics["routes/bytes_per_token"] = held / tokens
    return metrics


def route_bytes(micro_batches: Sequence[MicroBatch], rank_info: RankInfo) -> tuple[int, int]:
    """(bytes of routes this rank holds, tokens it accounts for: each token once over all ranks)."""
    held = sum(table.nbytes for each in micro_batches for table in (each.engine_routes, each.trainer_routes) if table)
    tokens = sum(each.layout.num_local_tokens // rank_info.tensor_size for each in micro_batches)
    return held, tokens if rank_info.pipeline_rank == 0 else 0
