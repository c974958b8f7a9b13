"""How far the rollout engine and the trainer are apart, and what R3 does about it: the same samples scored twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vespo_megatron.megatron.micro_batch import MicroBatch
from vespo_megatron.megatron.parallel import data_context_parallel_group
from vespo_megatron.trainer.loop import Trainer
from vespo_megatron.trainer.mismatch_table import FILE
from vespo_megatron.trainer.routes import StepRoutes, route_metrics


def measure(trainer: Trainer, run_dir: Path) -> None:
    """Generate `grpo.max_num_steps` rollout batches and score each with replay off and with R3; rank 0 writes."""
    rows = []
    trainer.push_weights(version=0)
    shape = trainer.policy.shape
    trainer.on_controller(lambda controller: controller.probe_routes(shape.num_moe_layers, shape.num_experts_per_tok))
    for batch in range(1, trainer.recipe.grpo.max_num_steps + 1):
        rollout = trainer.with_servers(lambda controller, batch=batch: controller.collect(batch))
        share = trainer.scatter.batch(rollout.batch if rollout else None)
        mini_batches = trainer.prepare(share)
        everything = [micro_batch for micro_batches in mini_batches for micro_batch in micro_batches]
        for mode in ("none", "R3"):
            metrics = _score(trainer, everything, share.normalizers[0], mode)
            if rollout:
                rows.append({"batch": batch, "replay": mode, **metrics})
    if trainer.controller is not None:
        (run_dir / FILE).write_text(json.dumps(rows, indent=1))


def _score(trainer: Trainer, micro_batches: list[MicroBatch], normalizer: Any, mode: str) -> dict[str, float]:
    for micro_batch in micro_batches:
        micro_batch.trainer_routes = None
    routes = StepRoutes(mode, trainer.policy, micro_batches, measure=True)
    outputs = trainer.policy.log_probs(micro_batches, routes=routes.log_prob_pass())
    routes.after_log_probs(micro_batches)
    metrics: dict[str, float] = {}
    if trainer.rank_info.is_last_stage:
        loss = trainer.objective.loss_function(normalizer)
        reports = []
        for (log_probs, entropies), micro_batch in zip(outputs, micro_batches, strict=True):
            micro_batch.old_log_probs = log_probs
            reports.append(loss(log_probs, entropies, micro_batch)[1])
        metrics = trainer.objective.metrics(reports).all_reduce(data_context_parallel_group()).finalize()
    gathered = trainer.scatter.to_rank_zero(
        (metrics if trainer.rank_info.reports else {}, routes.engine, routes.drift, 0, 0)
    )
    if not gathered:
        return {}
    return next(report[0] for report in gathered if report[0]) | route_metrics([report[1:] for report in gathered])
