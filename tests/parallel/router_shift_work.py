"""What the ranks of `test_router_shift` run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from layout_work import build, ragged_batch, weights, with_random_routes
from version_work import recipe_of

from vespo_megatron.trainer.objective import Objective
from vespo_megatron.trainer.step import TrainStep


def two_updates(
    folder: str,
    layout: dict[str, Any],
    store: str,
    *,
    objective: str = "grpo",
    hyperparameters: dict[str, Any] | None = None,
    apply: str = "before_clip",
    replay: str = "none",
    correction: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A training step of two updates: γ of both mini-batches, the weights each was measured under, and metrics.

    Every μ is a plausible one, so that responses have advantages of both signs and ratios near 1.
    """
    policy = build(folder, layout, store)
    for group in policy.optimizer.param_groups:
        group["lr"] = 0.003
    policy.scheduler.step = lambda **_: None  # which would set it anew
    recipe = recipe_of(
        folder,
        layout,
        behavior="recompute",
        replay=replay,
        **{
            "grpo.async_grpo.enabled": False,
            "loss_fn.name": objective,
            "loss_fn.hyperparameters": hyperparameters or {},
            "loss_fn.router_shift.apply": apply,
            "loss_fn.correction": correction or {},
        },
    )
    under: list[dict[str, torch.Tensor]] = []

    def look(_reports: Any) -> bool:
        under.append(weights(policy))
        return True

    step = TrainStep(recipe, policy, Objective(recipe.loss_fn, recipe.behavior), before_step=look)
    batch = with_random_routes(ragged_batch()) if replay == "R3" else ragged_batch()
    sliced = step.receive(batch if policy.rank_info.rank == 0 else None)
    routes = step.routes(sliced)
    after_log_probs = step.log_probs(sliced, routes)
    results = step.updates(sliced, routes, after_log_probs=after_log_probs, after_skip=lambda *_: None)
    metrics = step.reduce(results, routes, sliced)
    tables = {"R2": "trainer_routes", "R3": "engine_routes"}
    replayed = [(each, getattr(each, tables[replay])) for each in sliced.micro_batches if replay in tables]
    return {
        "gamma": [
            [(each.layout, [s.sample_id for s in each.batch.samples], each.router_shift.numpy()) for each in micro]
            for micro in sliced.mini_batches
        ]
        if policy.rank_info.reports
        else None,
        "under": under,
        "metrics": metrics,
        "experts_are_those_replayed": all(
            np.array_equal(each.router_scores.experts[table.recorded], table.experts[table.recorded])
            for each, table in replayed
        ),
    }
