"""The synchronous loop: generate, score, then N mini-batch updates on what is ever staler data, then new weights out.

Every rank runs this program. Rank 0 has a `Controller` besides, which talks to the rollout engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from vespo_megatron.controller.controller import Controller
from vespo_megatron.errors import UserError
from vespo_megatron.losses import MetricSums, learning_rate_scale
from vespo_megatron.megatron.micro_batch import MicroBatch, prepare
from vespo_megatron.megatron.parallel import RankInfo, data_context_parallel_group
from vespo_megatron.megatron.policy import MegatronPolicy, UpdateResult
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rollout_sglang.faults import WeightsNeeded
from vespo_megatron.trainer.checkpoint import Checkpointer, ResumePoint
from vespo_megatron.trainer.guard import Guard
from vespo_megatron.trainer.objective import Objective
from vespo_megatron.trainer.profile import profiled
from vespo_megatron.trainer.routes import StepRoutes, route_bytes, route_metrics
from vespo_megatron.trainer.scatter import BatchShard, Scatter
from vespo_megatron.trainer.timers import Timers
from vespo_megatron.trainer.utilization import utilization


class Trainer:
    """One rank of a synchronous run."""

    def __init__(
        self,
        recipe: Recipe,
        rank_info: RankInfo,
        policy: MegatronPolicy,
        controller: Controller | None,
        guard: Guard | None = None,
        checkpointer: Checkpointer | None = None,
    ) -> None:
        if (controller is None) != (rank_info.rank != 0):
            raise ValueError("rank 0 has the controller, the others have none")
        self.recipe, self.rank_info, self.policy, self.controller = recipe, rank_info, policy, controller
        self.objective = Objective(recipe.loss_fn)
        self.scatter = Scatter(recipe, policy)
        self.weight_version = 0
        self.guard = guard or Guard(recipe, rank_info, policy)
        self.timers = Timers(self.guard.heartbeat, rank_info.device)
        self.checkpointer = checkpointer
        self.profiles = recipe.logger.profile_step if self.guard.run_dir else 0

    def train(self, resumed: ResumePoint | None = None) -> bool:
        """All steps after the checkpoint `resumed`, with evaluation and logging; rank 0 writes.

        False when the run was stopped before the last.
        """
        schedule = self.recipe.grpo
        if self.objective.needs_reference:
            self.policy.keep_reference()  # of the policy the run started with, which no checkpoint holds
        done = self.resume(resumed) if resumed is not None else 0
        if done == schedule.max_num_steps:
            return True
        self.push_weights(self.weight_version)
        if self.recipe.policy.router_replay.mode == "R3":
            shape = self.policy.shape
            self.on_controller(
                lambda controller: controller.probe_routes(shape.num_moe_layers, shape.num_experts_per_tok)
            )
        if schedule.val_at_start and schedule.val_period and not done:
            self.with_servers(lambda controller: controller.log(0, controller.evaluate(0)))
        for step in range(done + 1, schedule.max_num_steps + 1):
            self.guard.begin(step)
            with profiled(self.guard.run_dir, self.rank_info.rank, step) if step == self.profiles else nullcontext():
                metrics = self.step(step)
            last = step == schedule.max_num_steps
            due = schedule.val_period and (step % schedule.val_period == 0 or (last and schedule.val_at_end))
            if due:
                with self.timers("evaluate"):
                    metrics |= self.with_servers(lambda controller, step=step: controller.evaluate(step)) or {}
            if self.checkpointer is not None:
                metrics |= self.checkpointer.pop_metrics()
            if self.controller is not None:
                self.controller.log(step, metrics | self.timers.pop())
            # After the log, so that no step is missing from it: a resumed run writes what comes after the checkpoint.
            stop = self.guard.should_stop(step, metrics) and not last
            saved = self.save_checkpoint(step, metrics, last=last, stop=stop)
            if stop:
                if self.controller is not None:
                    self.guard.stop.note_stopped(step, saved)
                return False
        return True

    def save_checkpoint(self, step: int, metrics: Mapping[str, Any], *, last: bool, stop: bool) -> str:
        """Save where the recipe wants it or the run ends here; where, when it is known already."""
        checkpointer = self.checkpointer
        if checkpointer is None or not (stop or checkpointer.due(step, last=last)):
            return ""
        controller = self.controller.state_dict if self.controller is not None else None
        with self.timers("checkpoint"):
            return checkpointer.save(step, self.state_dict(), controller, metrics, wait=stop or last)

    def state_dict(self) -> dict[str, Any]:
        """What every rank needs to go on, besides its policy; as JSON."""
        return {"weight_version": self.weight_version, "guard": self.guard.state_dict()}

    def resume(self, found: ResumePoint) -> int:
        """Be what the checkpoint holds; the step it was taken after."""
        controller_state = self.checkpointer.load(found)
        self.weight_version = found.facts["weight_version"]
        self.guard.load_state_dict(found.facts["guard"], self.controller.logger.history if self.controller else ())
        self.on_controller(lambda controller: controller.load_state_dict(controller_state))
        return found.step

    def step(self, step: int) -> dict[str, Any]:
        """One rollout batch: the paragraph of the module docstring. Returns metrics on rank 0."""
        started = time.perf_counter()
        with self.timers("generate"):
            rollout = self.with_servers(lambda controller: controller.collect(step))
        with self.timers("scatter"):
            share = self.scatter.batch(rollout.batch if rollout else None)
            mini_batches = self.prepare(share)
        if self.recipe.policy.generation.sglang_cfg.colocated:
            self.on_controller(lambda controller: controller.release_memory())
        everything = [micro_batch for micro_batches in mini_batches for micro_batch in micro_batches]
        replay = self.recipe.policy.router_replay
        routes = StepRoutes(replay.mode, self.policy, everything, replay.measure_agreement)
        ran_log_prob_pass = self.objective.needs_old_log_probs or routes.needs_log_prob_pass
        if ran_log_prob_pass:
            with self.timers("old_log_probs"):
                self.fill_old_log_probs(mini_batches, routes)
        if self.objective.needs_reference:
            with self.timers("reference_log_probs"):
                self.fill_ref_log_probs(mini_batches)
        results: list[UpdateResult] = []
        with self.timers("train"):
            for index, (micro_batches, normalizer) in enumerate(zip(mini_batches, share.normalizers, strict=True)):
                first = index == 0 and not ran_log_prob_pass
                config = self.objective.mini_batch_config(self.policy, micro_batches, routes.extra_pass())
                results.append(
                    self.policy.update(
                        micro_batches,
                        self.objective.loss_function(normalizer, config),
                        routes=routes.update_pass(first=first),
                        before_step=self.before_step,
                    )
                )
                routes.after_update(micro_batches, first=first)
                if not results[-1].succeeded:
                    self.guard.after_skip(step, index, rollout.batch if rollout else None)
        with self.timers("sync_weights"):
            self.after_updates(step)
        metrics = self.reduce(results) | self.reduce_routes(routes, everything)
        if rollout is None:
            return {}
        tokens, seconds = rollout.metrics["response/tokens"], time.perf_counter() - started
        metrics |= utilization(
            rollout.batch.samples,
            self.policy.shape,
            seconds=self.timers.seconds("train"),
            device=self.rank_info.device,
            devices=self.rank_info.world_size,
        )
        return rollout.metrics | metrics | {"time/step": seconds, "throughput/tokens_per_second": tokens / seconds}

    def after_updates(self, step: int) -> None:
        """New weights for the rollouts of the next step."""
        self.push_weights(version=step)

    def prepare(self, share: BatchShard) -> list[list[MicroBatch]]:
        """Slice every micro-batch for this rank."""
        for tables in share.routes:
            for table in filter(None, tables):
                table.check(self.policy.shape.num_experts, where=f"rank {self.rank_info.rank}")
        return [
            prepare(
                micro_batches,
                self.rank_info,
                temperature=self.recipe.policy.generation.temperature,
                log_prob_bytes=self.recipe.policy.megatron_cfg.logprob_memory_mb << 20,
                routes=tables,
            )
            for micro_batches, tables in zip(share.mini_batches, share.routes, strict=True)
        ]

    def fill_old_log_probs(self, mini_batches: list[list[MicroBatch]], routes: StepRoutes) -> None:
        """π_old: log-probs by the training engine under the weights the rollout batch starts with."""
        for micro_batches in mini_batches:
            outputs = self.policy.log_probs(micro_batches, routes=routes.log_prob_pass())
            routes.after_log_probs(micro_batches)
            if self.objective.needs_old_log_probs:
                for micro_batch, output in zip(micro_batches, outputs, strict=bool(outputs)):  # the last stage has them
                    micro_batch.old_log_probs = output[0]

    def fill_ref_log_probs(self, mini_batches: list[list[MicroBatch]]) -> None:
        """π_ref: log-probs under the weights the run started with."""
        for micro_batches in mini_batches:
            outputs = self.policy.ref_log_probs(micro_batches)
            for micro_batch, output in zip(micro_batches, outputs, strict=bool(outputs)):  # the last stage has them
                micro_batch.ref_log_probs = output[0]

    def before_step(self, reports: list[Any]) -> bool:
        """Between gradients and step: refuse numbers that are not finite, scale the learning rate by the ESS (VCPO)."""
        self.objective.raise_if_bad(reports)
        if not self.guard.fit(reports):
            return False
        rule = self.recipe.loss_fn.ess_learning_rate
        if rule == "none":
            return True
        ess = torch.zeros(1, device=self.rank_info.device)
        if self.rank_info.is_last_stage:
            metrics = self.objective.metrics(reports).all_reduce(data_context_parallel_group()).finalize()
            ess += metrics["vespo/ess"] / self.rank_info.tensor_size
        # Ranks of other stages hold 0, replicas along DP, CP and TP the same value: the mean over the last stage's.
        dist.all_reduce(ess)
        share = ess.item() / (self.rank_info.data_size * self.rank_info.context_size)
        self.policy.scale_learning_rate(learning_rate_scale(share, rule, self.recipe.loss_fn.ess_base))
        return True

    def push_weights(self, version: int) -> None:
        """Stream the policy's weights to the rollout engine, which answers with an agreed checksum.

        Returns on every rank when the servers have them. An update in which a server fails is made again without it.
        """
        while True:
            stream = self.policy.exporter.stream()
            failure = None
            if self.controller is not None:
                try:
                    self.controller.update_weights(stream, version)
                except UserError as error:
                    failure = error
            for _ in stream:  # elsewhere all of it; here what a failed update has left, for which the others wait
                pass
            try:
                self.on_controller(lambda controller, failure=failure: _raise(failure))
                break
            except WeightsNeeded:
                continue
        self.weight_version = version

    def with_servers(self, action: Callable[[Controller], Any]) -> Any:
        """As `on_controller`; servers that come back in the middle of it are given their weights, and it goes on."""
        while True:
            try:
                return self.on_controller(action)
            except WeightsNeeded:
                self.push_weights(self.weight_version)

    def on_controller(self, action: Callable[[Controller], Any]) -> Any:
        """Run `action` on rank 0 while the others wait; its `UserError` ends every rank. Rank 0 gets the answer."""
        answer, failure = None, None
        if self.controller is not None:
            try:
                answer = action(self.controller)
            except UserError as error:
                failure = error
        shared = [failure]
        dist.broadcast_object_list(shared, src=0, group=self.scatter.group)
        if shared[0] is not None:
            raise shared[0]
        return answer

    def reduce_routes(self, routes: StepRoutes, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """Route agreement and storage over all ranks; complete on rank 0, empty elsewhere."""
        report = (routes.engine, routes.drift, *route_bytes(micro_batches, self.rank_info))
        return route_metrics(self.scatter.to_rank_zero(report))

    def reduce(self, results: list[UpdateResult]) -> dict[str, Any]:
        """Metrics of the updates that were taken, over all ranks; complete on rank 0, empty elsewhere."""
        skipped = sum(not result.succeeded for result in results)
        last_rate = results[-1].learning_rate
        results = [result for result in results if result.succeeded] or results[-1:]
        finished: list[dict[str, float]] = []
        histograms: dict[str, Any] = {}
        if self.rank_info.is_last_stage:
            group = data_context_parallel_group()
            per_update = [self.objective.metrics(result.reports).all_reduce(group) for result in results]
            finished = [sums.finalize() for sums in per_update]
            whole = sum(per_update, start=MetricSums())
            merged = whole.finalize() | _spread(finished)
            histograms = {name: (edges, counts.cpu()) for name, (edges, counts) in whole.histograms.items()}
        else:
            merged = {}
        report = (merged, histograms) if self.rank_info.reports and merged else None
        reports = [report for report in self.scatter.to_rank_zero(report) if report]
        if not reports:
            return {}
        merged, histograms = reports[0]
        terms = ("loss/policy", "loss/kl", "loss/entropy")  # shares of one mini-batch each, hence their mean
        return (
            merged
            | {name: merged[name] / len(results) for name in terms if name in merged}
            | {
                "loss/grad_norm": sum(result.grad_norm for result in results) / len(results),
                "loss/grad_norm_max": max(result.grad_norm for result in results),
                "loss/skipped_updates": float(skipped),
                "loss/learning_rate": last_rate,
                "loss/updates": float(len(results)),
                "histograms": histograms,
            }
        )


def _raise(failure: UserError | None) -> None:
    if failure is not None:
        raise failure


def _spread(per_update: list[dict[str, float]]) -> dict[str, float]:
    """What staleness does inside a rollout batch: W, φ, ESS and k3 of its first and last update."""
    if len(per_update) < 2:
        return {}
    names = ("vespo/w_mean", "vespo/phi_mean", "vespo/ess", "mismatch/k3")
    return {
        f"{name}_{which}_update": metrics[name]
        for which, metrics in (("first", per_update[0]), ("last", per_update[-1]))
        for name in names
        if name in metrics
    }
