"""What a rank does besides training: shows that it lives, refuses bad updates, sees collapse, stops when asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vespo_megatron.data.batch import Batch
from vespo_megatron.errors import UserError
from vespo_megatron.megatron import hf_weights
from vespo_megatron.megatron.policy import MegatronPolicy, UpdateResult
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.heartbeat import Heartbeat
from vespo_megatron.run.stopping import StopRequest
from vespo_megatron.trainer import bundle
from vespo_megatron.trainer.collapse_detectors import CollapseDetectors
from vespo_megatron.trainer.finiteness import FinitenessVerdict, finiteness
from vespo_megatron.trainer.scatter import plan_shards


class Guard:
    """One rank's; without a run directory (tests, measurements) it watches numbers and keeps nothing."""

    def __init__(
        self,
        recipe: Recipe,
        policy: MegatronPolicy,
        run_dir: Path | None = None,
        heartbeat: Heartbeat | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.recipe, self.policy, self.run_dir, self.heartbeat = recipe, policy, run_dir, heartbeat
        self.rank_info = policy.rank_info
        self.stop = stop or StopRequest(run_dir)
        self.detectors = CollapseDetectors(recipe.guard)
        self.verdict: FinitenessVerdict | None = None
        self._skipped_in_a_row = 0
        self._bundles = 0
        if heartbeat is not None:
            policy.on_progress = heartbeat.beat

    def begin(self, step: int) -> None:
        """A step begins."""
        if self.heartbeat is not None:
            self.heartbeat.step = step
            self.heartbeat.enter("step")

    def admits(self, reports: Sequence[Any]) -> bool:
        """Whether the optimizer may have this update: its loss and gradients are finite on every rank; a collective.

        In float16 it also gets gradients that are not, which it skips and the loss scale learns from.
        """
        self.verdict = finiteness(self.policy, reports)
        if self.verdict.finite:
            self._skipped_in_a_row = 0
        return self.verdict.finite or (self.policy.loss_scale is not None and not self.verdict.loss)

    def after_skip(self, step: int, update: int, result: UpdateResult, batch: Batch | None) -> None:
        """An update was not taken: keep what it was; a collective. Rank 0 has the whole rollout batch.

        Gradients that overflow float16 are no fault, and not kept, as long as a smaller loss scale is left.

        Raises:
            UserError: on every rank, when there have been `guard.max_skipped_updates` in a row.
        """
        config, verdict, scale = self.recipe.guard, str(self.verdict), self.policy.loss_scale
        if result.overflowed and scale is not None and result.loss_scale is not None:
            verdict = f"{verdict}, at a loss scale of {result.loss_scale:g}"
            if not scale.is_smallest(result.loss_scale):
                if self.rank_info.rank == 0:
                    print(f"vespo-megatron: step {step}, update {update}: overflow: {verdict}; skipped", flush=True)
                return
            verdict += ", the smallest that optimizer.min_loss_scale allows"
        self._skipped_in_a_row += 1
        kept = ""
        if self.run_dir is not None and self._bundles < config.max_bundles:
            self._bundles += 1
            kept = self._keep(self.run_dir, step, update, batch, verdict)
        text = f"step {step}, update {update}: not finite: {verdict}; skipped" + (f", kept in {kept}" if kept else "")
        if self.rank_info.rank == 0:
            print(f"vespo-megatron: {text}", flush=True)
        if self._skipped_in_a_row >= config.max_skipped_updates:
            raise UserError(
                f"{self._skipped_in_a_row} updates in a row were not finite; the last: {verdict}",
                where=f"step {step}",
                expected=f"fewer than guard.max_skipped_updates={config.max_skipped_updates}",
                fix=f"vespo-megatron replay-step {kept or '<run>/bundles/…'} says where the first such number appears",
            )

    def _keep(self, run_dir: Path, step: int, update: int, batch: Batch | None, not_finite: str) -> str:
        """Where it is kept now; empty where it cannot be, which is told."""
        folder = bundle.bundle_folder(run_dir, step, update)
        problem: Exception | None = None
        if batch is not None:
            shards = plan_shards(batch, self.recipe, self.rank_info.data_size, self.policy.shape)
            parts = [part for shard in shards for part in shard.mini_batches[update]]
            wanted = {sample.sample_id for part in parts for sample in part.samples}
            indices = [index for index, sample in enumerate(batch.samples) if sample.sample_id in wanted]
            try:
                bundle.write(folder, bundle.Bundle(self.recipe, step, update, not_finite, batch.select(indices)))
            except OSError as error:
                problem = error
        if self.recipe.guard.save_weights:
            try:
                hf_weights.save(self.policy.exporter, folder / bundle.WEIGHTS, copy_from=self.policy.model_folder)
            except UserError as error:  # on every rank
                problem = problem or error
        if problem is not None and self.rank_info.rank == 0:
            print(f"vespo-megatron: cannot keep {folder}: {problem}", flush=True)
        return "" if problem else str(folder)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps of it; the detectors read the run's own metrics again."""
        return {"skipped_in_a_row": self._skipped_in_a_row, "bundles": self._bundles}

    def load_state_dict(self, state: Mapping[str, int], history: Sequence[Mapping[str, Any]] = ()) -> None:
        """Go on from `state`; rank 0 gives the metrics of the steps so far."""
        self._skipped_in_a_row, self._bundles = state["skipped_in_a_row"], state["bundles"]
        for metrics in history:
            self.detectors.observe(metrics)

    def should_stop(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Whether to leave the loop after this step, agreed on by all ranks; a collective. Rank 0 has the metrics."""
        wanted = self.stop.asked()
        for finding in self.detectors.observe(metrics) if self.rank_info.rank == 0 else ():
            print(f"vespo-megatron: step {step}: {finding.text}", flush=True)
            if self.recipe.guard.on_collapse == "stop":
                wanted, self.stop.reason = True, f"{finding.rule} collapsed: {finding.text}"
        flag = torch.tensor([int(wanted)], device=self.rank_info.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
