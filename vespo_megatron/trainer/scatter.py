"""How a rollout batch reaches the ranks: planned on rank 0, each rank receiving only its data parallel shard."""

from __future__ import annotations

import copy
import datetime
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.layout import padded_length
from vespo_megatron.data.packing import plan_mini_batches
from vespo_megatron.errors import UserError
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.losses import Normalizer
from vespo_megatron.megatron import flops
from vespo_megatron.megatron.micro_batch import layouts
from vespo_megatron.megatron.parallel import RankInfo
from vespo_megatron.megatron.policy import MegatronPolicy
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.routing_replay.table import RouteTable, slice_routes
from vespo_megatron.trainer.version_passes import VersionPass, plan_version_passes


@dataclass
class BatchShard:
    """One data parallel rank's part of a rollout batch."""

    mini_batches: list[list[Batch]]
    """[mini-batch][micro-batch], the same counts on every rank."""
    normalizers: list[Normalizer]
    """Global counts of each mini-batch."""
    routes: list[list[RouteTable | None]]
    """[mini-batch][micro-batch], the engine's routes for the receiving rank alone; None where there are none."""
    version_passes: tuple[VersionPass, ...] = ()
    """How π_old is computed with `behavior: version`."""


class Scatter:
    """Object collectives between rank 0 and the others, on a gloo group with a deadline of its own.

    Ranks wait here while rank 0 generates, which may take longer than any other collective may.
    """

    def __init__(self, recipe: Recipe, policy: MegatronPolicy) -> None:
        self.recipe, self.rank_info, self.shape = recipe, policy.rank_info, policy.shape
        timeout = 600.0 + 4 * recipe.policy.generation.sglang_cfg.request_timeout
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self._ranks: list[tuple[RankInfo, list[int]]] = [(self.rank_info, [])] * self.rank_info.world_size
        dist.all_gather_object(self._ranks, (self.rank_info, policy.moe_layers), group=self.group)

    def batch(self, batch: Batch | UserError | None) -> BatchShard:
        """Rank 0 gives the rollout batch (or the error that stops everyone), every rank gets its shard."""
        objects: list[Any] = [None] * self.rank_info.world_size
        if isinstance(batch, Batch):
            shards = plan_shards(batch, self.recipe, self.rank_info.data_size, self.shape)
            objects = [
                self._for_rank(shards[rank_info.data_rank], rank_info, layers) for rank_info, layers in self._ranks
            ]
        elif batch is not None:
            objects = [batch] * self.rank_info.world_size
        received: list[Any] = [None]
        dist.scatter_object_list(received, objects if self.rank_info.rank == 0 else None, src=0, group=self.group)
        if isinstance(received[0], UserError):
            raise received[0]
        return received[0]

    def _for_rank(self, shard: BatchShard, rank_info: RankInfo, moe_layers: list[int]) -> BatchShard:
        """Cut the routes to what a rank uses, and send the samples without them."""
        with_routes = all(
            sample.routes is not None for batches in shard.mini_batches for b in batches for sample in b.samples
        )
        wanted = self.recipe.policy.router_replay
        if wanted.mode != "R3" and not (with_routes and wanted.measure_agreement):
            tables = shard.routes
        else:
            tables = [
                [
                    slice_routes(
                        batch.samples,
                        layout,
                        moe_layers,
                        topk=self.shape.num_experts_per_tok,
                        num_experts=self.shape.num_experts,
                    )
                    for batch, layout in zip(micro_batches, layouts(micro_batches, rank_info), strict=True)
                ]
                for micro_batches in shard.mini_batches
            ]
        stripped = [[_without_routes(batch) for batch in micro_batches] for micro_batches in shard.mini_batches]
        return BatchShard(stripped, shard.normalizers, tables, shard.version_passes)

    def to_rank_zero(self, report: Any) -> list[Any]:
        """Every rank's report, in rank order, on rank 0; an empty list elsewhere."""
        gathered: list[Any] | None = [None] * self.rank_info.world_size if self.rank_info.rank == 0 else None
        dist.gather_object(report, gathered, dst=0, group=self.group)
        return gathered or []


def _without_routes(batch: Batch) -> Batch:
    samples = []
    for sample in batch.samples:
        samples.append(copy.copy(sample))
        samples[-1].routes = samples[-1].route_versions = None
    return Batch(samples, batch.advantages, batch.lags)


def plan_shards(batch: Batch, recipe: Recipe, data_parallel_size: int, shape: ModelShape) -> list[BatchShard]:
    """Cut a rollout batch into mini-batches and micro-batches of equal work for each data parallel rank. Pure."""
    policy, megatron = recipe.policy, recipe.policy.megatron_cfg
    packing = policy.sequence_packing
    virtual = megatron.virtual_pipeline_model_parallel_size
    plan = plan_mini_batches(
        [sample.num_tokens for sample in batch.samples],
        num_mini_batches=max(1, round(len(batch) / policy.train_global_batch_size)),
        data_parallel_size=data_parallel_size,
        token_budget=packing.train_mb_tokens if packing.enabled else None,
        max_sequences=None if packing.enabled else policy.train_micro_batch_size,
        padded_length=lambda length: padded_length(length, megatron.context_parallel_size),
        cost=lambda length: flops.sequence_cost(shape, length),
        round_up_to=megatron.pipeline_model_parallel_size if virtual else 1,
    )
    normalizers = []
    for mini_batch in plan.mini_batches:
        members = [index for rank in mini_batch for micro_batch in rank for index in micro_batch]
        lengths = [int(batch.samples[index].loss_mask.sum()) for index in members]
        normalizers.append(Normalizer.from_lengths(lengths, recipe.loss_fn.aggregation_length))
    shards = [
        [[batch.select(micro_batch) for micro_batch in mini_batch[rank]] for mini_batch in plan.mini_batches]
        for rank in range(data_parallel_size)
    ]
    passes: tuple[VersionPass, ...] = ()
    if recipe.behavior == "version":
        passes = plan_version_passes(shards, multiple_of=megatron.pipeline_model_parallel_size if virtual else 1)
    return [
        BatchShard(mini_batches, normalizers, [[None] * len(mini_batch) for mini_batch in mini_batches], passes)
        for mini_batches in shards
    ]
