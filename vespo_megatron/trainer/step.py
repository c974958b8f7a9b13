"""A training step on one rank: scatter → slice → log-probs → updates → reduce. It knows no schedule and no controller.

The loops, `vespo-megatron mismatch` and `vespo-megatron replay-step` are made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vespo_megatron.data.batch import Batch
from vespo_megatron.losses import Normalizer
from vespo_megatron.megatron.micro_batch import MicroBatch, prepare
from vespo_megatron.megatron.policy import MegatronPolicy, UpdateResult
from vespo_megatron.megatron.weight_history import WeightHistory
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.trainer.expert_load import expert_load_metrics, stage_load
from vespo_megatron.trainer.objective import Objective
from vespo_megatron.trainer.off_policy_baseline import OffPolicyBaseline
from vespo_megatron.trainer.router_loss_metrics import router_loss_metrics, stage_losses
from vespo_megatron.trainer.routes import StepRoutes, route_bytes, route_metrics
from vespo_megatron.trainer.scatter import Scatter
from vespo_megatron.trainer.timers import Timers
from vespo_megatron.trainer.update_metrics import reduce_updates, taken
from vespo_megatron.trainer.version_passes import VersionPass


@dataclass(frozen=True)
class SlicedBatch:
    """A rollout batch as this rank sees it."""

    mini_batches: list[list[MicroBatch]]
    """[mini-batch][micro-batch]"""
    normalizers: list[Normalizer]
    """Global counts of each mini-batch."""
    version_passes: tuple[VersionPass, ...] = ()
    """How π_old is computed with `behavior: version`."""

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """All of them, in order."""
        return [micro_batch for micro_batches in self.mini_batches for micro_batch in micro_batches]


class TrainStep:
    """See the module. Every method is a collective.

    Args:
        before_step: between gradients and optimizer, given the update's reports: may raise, or refuse the update.
        timers: told of each phase.
        history: weights of earlier versions, for `behavior: version`; without it π_old is of the weights there are.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: MegatronPolicy,
        objective: Objective,
        *,
        before_step: Callable[[Sequence[Any]], bool] = lambda reports: True,
        timers: Timers | None = None,
        history: WeightHistory | None = None,
    ) -> None:
        self.recipe, self.policy, self.objective, self.history = recipe, policy, objective, history
        self.scatter = Scatter(recipe, policy)
        self.timers = timers or Timers()
        self._before_step = before_step
        self._baseline: OffPolicyBaseline | None = None
        if recipe.loss_fn.off_policy_baseline == "vcpo":
            self._baseline = OffPolicyBaseline(
                policy,
                self.scatter.group,
                normalize=recipe.grpo.normalize_rewards,
                zero_truncated=recipe.grpo.overlong == "zero_advantage",
            )

    def receive(self, batch: Batch | None) -> SlicedBatch:
        """This rank's slices of the rollout batch, which rank 0 gives."""
        shard = self.scatter.batch(batch)
        for tables in shard.routes:
            for table in filter(None, tables):
                table.check(self.policy.shape.num_experts, where=f"rank {self.policy.rank_info.rank}")
        mini_batches = [
            prepare(
                micro_batches,
                self.policy.rank_info,
                temperature=self.recipe.policy.generation.temperature,
                log_prob_bytes=self.recipe.policy.megatron_cfg.logprob_memory_mb << 20,
                routes=tables,
            )
            for micro_batches, tables in zip(shard.mini_batches, shard.routes, strict=True)
        ]
        return SlicedBatch(mini_batches, shard.normalizers, shard.version_passes)

    def routes(self, batch: SlicedBatch) -> StepRoutes:
        """What the recipe's routing replay does with the routes of this batch."""
        replay = self.recipe.policy.router_replay
        shift = self.objective.needs_router_shift
        return StepRoutes(replay.mode, self.policy, batch.micro_batches, replay.measure_agreement, shift=shift)

    def log_probs(self, batch: SlicedBatch, routes: StepRoutes) -> bool:
        """Fill π_old and π_ref where the objective needs them; whether π_old's pass was run (R2 records there)."""
        needs_pass = self.objective.needs_old_log_probs or routes.needs_log_prob_pass
        if needs_pass:
            with self.timers("old_log_probs"):
                if self.history is not None:
                    self._fill_by_version(batch, routes, self.history)
                else:
                    self._fill_old_log_probs(batch, routes)
        if self.objective.needs_reference:
            with self.timers("reference_log_probs"):
                self._fill_reference_log_probs(batch)
        return needs_pass

    def updates(
        self,
        batch: SlicedBatch,
        routes: StepRoutes,
        *,
        after_log_probs: bool,
        after_skip: Callable[[int, UpdateResult], None],
    ) -> list[UpdateResult]:
        """One optimizer update per mini-batch.

        Args:
            after_log_probs: whether a pass over the data came before, in which routes were compared.
            after_skip: called with the number of an update that was not taken, and what came of it.
        """
        results: list[UpdateResult] = []
        for index, (micro_batches, normalizer) in enumerate(zip(batch.mini_batches, batch.normalizers, strict=True)):
            first = index == 0 and not after_log_probs
            if self._baseline is not None:
                with self.timers("off_policy_baseline"):
                    self._baseline.apply(micro_batches)
            config, counts = self.objective.over_mini_batch(self.policy, micro_batches, routes.extra_pass(), normalizer)
            if self.policy.needs_choices:
                with self.timers("router_choices"):
                    self.policy.count_choices(micro_batches, routes=routes.extra_pass())
            result = self.policy.update(
                micro_batches,
                self.objective.loss_function(counts, config),
                routes=routes.update_pass(first=first),
                before_step=self._before_step,
            )
            results.append(result)
            routes.after_update(micro_batches, first=first)
            if not result.succeeded:
                after_skip(index, result)
        return results

    def reduce(self, results: Sequence[UpdateResult], routes: StepRoutes, batch: SlicedBatch) -> dict[str, Any]:
        """Metrics of updates and routes over all ranks; complete on rank 0, empty elsewhere."""
        metrics = reduce_updates(results, self.objective, self.policy.rank_info, self.scatter)
        report = (routes.engine, routes.drift, *route_bytes(batch.micro_batches, self.policy.rank_info))
        counted = taken(results)
        reports = self.scatter.to_rank_zero(
            (report, stage_load(counted, self.policy), stage_losses(counted, self.policy))
        )
        per_layer = self.recipe.policy.megatron_cfg.moe_per_layer_logging
        return (
            metrics
            | route_metrics([report for report, _, _ in reports])
            | expert_load_metrics([load for _, load, _ in reports], per_layer=per_layer)
            | router_loss_metrics([losses for _, _, losses in reports], per_layer=per_layer)
            | self._version_metrics(batch)
        )

    def _fill_old_log_probs(self, batch: SlicedBatch, routes: StepRoutes) -> None:
        """π_old: log-probs by the training engine under the weights the rollout batch starts with."""
        for micro_batches in batch.mini_batches:
            outputs = self.policy.log_probs(micro_batches, routes=routes.log_prob_pass())
            routes.after_log_probs(micro_batches)
            if self.objective.needs_old_log_probs:
                for micro_batch, output in zip(micro_batches, outputs, strict=bool(outputs)):  # the last stage has them
                    micro_batch.old_log_probs = output[0]

    def _fill_by_version(self, batch: SlicedBatch, routes: StepRoutes, history: WeightHistory) -> None:
        """π_old: of each token under the weights that drew it."""
        for each in batch.version_passes:
            with history.under(each.version, where=f"sample {each.sample_id}"):
                for micro_batches, indices in zip(batch.mini_batches, each.micro_batches, strict=True):
                    chosen = [micro_batches[index] for index in indices]
                    if not chosen:
                        continue
                    outputs = self.policy.log_probs(chosen, routes=routes.version_pass(each.version))
                    routes.after_version_pass(chosen, each.version)
                    for micro_batch, output in zip(chosen, outputs, strict=bool(outputs)):  # the last stage has them
                        _fill_tokens(micro_batch, output[0], each.version)
        routes.after_log_probs(batch.micro_batches)

    def _version_metrics(self, batch: SlicedBatch) -> dict[str, float]:
        """What π_old by version took, on this rank."""
        if self.history is None:
            return {}
        forwards = sum(len(indices) for each in batch.version_passes for indices in each.micro_batches)
        seconds, self.history.swap_seconds = self.history.swap_seconds, 0.0
        return {
            "staleness/versions": float(len(batch.version_passes)),
            "staleness/version_forwards": forwards / len(batch.micro_batches),
            "staleness/swap_seconds": seconds,
            "staleness/held_versions": float(len(self.history.held)),
            "staleness/held_bytes": float(self.history.nbytes),
        }

    def _fill_reference_log_probs(self, batch: SlicedBatch) -> None:
        """π_ref: log-probs under the weights the run started with."""
        for micro_batches in batch.mini_batches:
            outputs = self.policy.ref_log_probs(micro_batches)
            for micro_batch, output in zip(micro_batches, outputs, strict=bool(outputs)):  # the last stage has them
                micro_batch.ref_log_probs = output[0]


def _fill_tokens(micro_batch: MicroBatch, log_probs: torch.Tensor, version: int) -> None:
    """π_old of the tokens that a version drew; [R]. One that no pass fills stays NaN, which no loss takes."""
    if micro_batch.old_log_probs is None:
        micro_batch.old_log_probs = torch.full_like(log_probs, float("nan"))
    versions = micro_batch.layout.response_values([sample.weight_versions for sample in micro_batch.batch.samples])
    drawn = torch.from_numpy(versions == version).to(log_probs.device)
    micro_batch.old_log_probs = torch.where(drawn, log_probs, micro_batch.old_log_probs)
