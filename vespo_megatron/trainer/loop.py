"""The training loop: generate, score, then N mini-batch updates on what is ever staler data, then new weights out.

Every rank runs this program. Rank 0 has a `Controller` besides, which talks to the rollout engine. In an asynchronous
run batches wait already when they are asked for, and weights go out every `sync_every` steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from vespo_megatron.controller.controller import Controller
from vespo_megatron.controller.parts import Evaluations
from vespo_megatron.megatron.policy import MegatronPolicy
from vespo_megatron.megatron.weight_history import WeightHistory
from vespo_megatron.quantization import WeightQuantizer
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.trainer.checkpoint import Checkpointer, ResumePoint
from vespo_megatron.trainer.controller_link import ControllerLink
from vespo_megatron.trainer.guard import Guard
from vespo_megatron.trainer.learning_rate import scale_by_ess, scale_by_staleness
from vespo_megatron.trainer.objective import Objective
from vespo_megatron.trainer.profile import profiled
from vespo_megatron.trainer.step import TrainStep
from vespo_megatron.trainer.timers import Timers
from vespo_megatron.trainer.utilization import utilization


class Trainer:
    """One rank of a run."""

    def __init__(
        self,
        recipe: Recipe,
        policy: MegatronPolicy,
        controller: Controller | None,
        guard: Guard | None = None,
        checkpointer: Checkpointer | None = None,
    ) -> None:
        self.recipe, self.policy, self.rank_info = recipe, policy, policy.rank_info
        self.guard = guard or Guard(recipe, policy)
        self.timers = Timers(self.guard.heartbeat, self.rank_info.device)
        asynchronous = recipe.grpo.async_grpo
        max_lag = math.ceil(asynchronous.staleness) if asynchronous.enabled else None
        self.objective = Objective(recipe.loss_fn, recipe.behavior, max_lag)
        self.history = WeightHistory(policy, recipe.held_versions) if recipe.behavior == "version" else None
        self.train_step = TrainStep(
            recipe,
            policy,
            self.objective,
            before_step=self._before_step,
            timers=self.timers,
            history=self.history,
        )
        quantizer = WeightQuantizer.of(recipe.policy)
        self.link = ControllerLink(
            policy,
            controller,
            self.train_step.scatter.group,
            self.history,
            quantizer,
            shares_devices=recipe.policy.generation.shares_devices,
        )
        self.checkpointer = checkpointer

    @property
    def controller(self) -> Controller | None:
        """Rank 0's; None elsewhere."""
        return self.link.controller

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
        self.link.push_again()
        if self.recipe.policy.router_replay.mode == "R3":
            probe_routes(self.link)
        if schedule.evaluates_after(0) and not done:
            metrics = self.evaluate(0, wait=True)
            self.link.call(lambda controller: controller.log(0, metrics))
        return all(self.one_step(step) for step in range(done + 1, schedule.max_num_steps + 1))

    def one_step(self, step: int) -> bool:
        """A step with what the schedule puts around it; False when the run ends after it though it is not the last."""
        schedule = self.recipe.grpo
        self.guard.begin(step)
        with self._profiled(step):
            metrics = self.step(step)
        last = step == schedule.max_num_steps
        with self.timers("evaluate") if last or schedule.evaluates_after(step) else nullcontext():
            metrics |= self.evaluate(step, wait=last)
        if self.checkpointer is not None:
            metrics |= self.checkpointer.pop_metrics()
        if self.controller is not None:
            self.controller.log(step, metrics | self.timers.pop())
        # After the log, so that no step is missing from it: a resumed run writes what comes after the checkpoint.
        stop = self.guard.should_stop(step, metrics) and not last
        saved = self.save_checkpoint(step, last=last, stop=stop)
        if stop and self.controller is not None:
            self.guard.stop.note_stopped(step, saved)
        return not stop

    def evaluate(self, step: int, *, wait: bool) -> dict[str, float]:
        """The evaluation that the schedule has after this step; its metrics on rank 0, when they are known already.

        Those of others that have ended are logged; with `wait`, so are all that go on beside training.
        """
        ended: Evaluations = {}
        if self.recipe.grpo.evaluates_after(step):
            ended |= self.link.call_with_servers(lambda controller: controller.evaluate(step)) or {}
        if wait:
            ended |= self.link.call_with_servers(lambda controller: controller.await_evaluations()) or {}
        metrics = ended.pop(step, {})
        if self.controller is not None:
            self.controller.log_evaluations(ended)
        return metrics

    def step(self, step: int) -> dict[str, Any]:
        """One rollout batch: the first sentence of the module. Returns metrics on rank 0."""
        started = time.perf_counter()
        with self.timers("generate"):
            rollout = self.link.call_with_servers(lambda controller: controller.collect(step))
            self.link.turns.to_trainer()
        with self.timers("scatter"):
            batch = self.train_step.receive(rollout.batch if rollout else None)
        routes = self.train_step.routes(batch)
        after_log_probs = self.train_step.log_probs(batch, routes)
        with self.timers("train"):
            results = self.train_step.updates(
                batch,
                routes,
                after_log_probs=after_log_probs,
                after_skip=lambda update, result: self.guard.after_skip(
                    step, update, result, rollout.batch if rollout else None
                ),
            )
        with self.timers("sync_weights"):
            self.push_new_weights(step)
        metrics = self.train_step.reduce(results, routes, batch)
        if rollout is None or self.controller is None:
            return {}
        self.controller.log_evaluations(rollout.evaluations)
        tokens, seconds = rollout.metrics["response/tokens"], time.perf_counter() - started
        metrics |= utilization(
            rollout.batch.samples,
            self.policy.shape,
            seconds=self.timers.seconds("train"),
            device=self.rank_info.device,
            devices=self.rank_info.world_size,
        )
        return rollout.metrics | metrics | {"time/step": seconds, "throughput/tokens_per_second": tokens / seconds}

    def push_new_weights(self, step: int) -> None:
        """New weights for the rollouts of the next step; asynchronous, for those under way, every `sync_every` steps.

        Synchronous versions are steps. Asynchronous ones count the updates of the engine, so that a lag is a number
        of them, whatever `sync_every` is.
        """
        asynchronous = self.recipe.grpo.async_grpo
        if not asynchronous.enabled:
            self.link.push_weights(version=step)
        elif step % asynchronous.sync_every == 0:
            self.link.push_weights(self.link.weight_version + 1)

    def _before_step(self, reports: Sequence[Any]) -> bool:
        """Between gradients and optimizer: bad samples are named, numbers that are not finite refuse the update."""
        self.objective.raise_if_bad(reports)
        if not self.guard.admits(reports):
            return False
        scale_by_ess(self.recipe.loss_fn, self.policy, self.objective, reports)
        scale_by_staleness(self.recipe.grpo.async_grpo, self.policy, reports)
        return True

    def _profiled(self, step: int) -> Any:
        run_dir = self.guard.run_dir
        if run_dir is None or step != self.recipe.logger.profile_step:
            return nullcontext()
        return profiled(run_dir, self.rank_info.rank, step)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int, *, last: bool, stop: bool) -> str:
        """Save where the recipe wants it or the run ends here; where, when it is known already."""
        checkpointer = self.checkpointer
        if checkpointer is None or not (stop or checkpointer.due(step, last=last)):
            return ""
        controller = self.controller.state_dict if self.controller is not None else None
        if self.link.turns.shared:
            with self.timers("sync_weights"):
                self.link.turns.to_trainer()
        with self.timers("checkpoint"):
            return checkpointer.save(step, self.state_dict(), controller, history=self.history, wait=stop or last)

    def state_dict(self) -> dict[str, Any]:
        """What every rank needs to go on, besides its policy; as JSON."""
        return self.link.state_dict() | {"guard": self.guard.state_dict()}

    def resume(self, point: ResumePoint) -> int:
        """Be what the checkpoint holds; the step it was taken after."""
        if self.checkpointer is None:
            raise ValueError("a run without checkpoints cannot be resumed")
        controller_state = self.checkpointer.load(point, self.history)
        self.link.load_state_dict(point.facts)
        self.guard.load_state_dict(point.facts["guard"], self.controller.logger.history if self.controller else ())
        self.link.call(lambda controller: controller.load_state_dict(controller_state))
        if self.history is not None:
            # The run may have had another `behavior` so far, which kept no versions.
            known: set[int] = {*self.history.held, *point.facts.get("live_version", ())}
            self.link.call(lambda controller: controller.expire_other_versions(known))
        return point.step


def probe_routes(link: ControllerLink) -> None:
    """Does the engine return routes of this model's shape? Raises UserError on every rank when not."""
    shape = link.policy.shape
    link.call(lambda controller: controller.probe_routes(shape.num_moe_layers, shape.num_experts_per_tok))
