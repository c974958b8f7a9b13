"""How far the rollout engine and the trainer are apart, and what R3 does about it: the same samples scored twice."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vespo_megatron.controller.controller import Controller
from vespo_megatron.megatron.micro_batch import MicroBatch
from vespo_megatron.megatron.parallel import data_context_parallel_group
from vespo_megatron.megatron.policy import MegatronPolicy
from vespo_megatron.quantization import WeightQuantizer
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.routing_replay.table import RouteTable
from vespo_megatron.trainer.account import Accountant, SampleAccount, as_json
from vespo_megatron.trainer.controller_link import ControllerLink
from vespo_megatron.trainer.loop import probe_routes
from vespo_megatron.trainer.mismatch_table import ACCOUNT, FILE
from vespo_megatron.trainer.objective import Objective
from vespo_megatron.trainer.routes import StepRoutes, route_metrics
from vespo_megatron.trainer.step import TrainStep


def measure(
    recipe: Recipe, policy: MegatronPolicy, controller: Controller | None, run_dir: Path, *, updates: bool = False
) -> None:
    """Generate `grpo.max_num_steps` rollout batches, score each with replay off and with R3, account for each token.

    Rank 0 writes. With `updates` every batch is trained on after that, and what this changes is `staleness`.
    """
    step = TrainStep(recipe, policy, Objective(recipe.loss_fn, recipe.behavior))
    quantizer = WeightQuantizer.of(recipe.policy)
    shares_devices = recipe.policy.generation.shares_devices
    link = ControllerLink(policy, controller, step.scatter.group, quantizer=quantizer, shares_devices=shares_devices)
    accountant = Accountant(policy, step.scatter, quantizer)
    listens = recipe.policy.generation.backend == "in_process"  # a server does not tell its hidden states
    rows, lines = [], []
    link.push_weights(version=0)
    probe_routes(link)
    for number in range(1, recipe.grpo.max_num_steps + 1):
        rollout = link.call_with_servers(partial(Controller.collect, step=number))
        link.turns.to_trainer()
        batch = step.receive(rollout.batch if rollout else None)
        prefilled = link.call(partial(Controller.score, samples=rollout.batch.samples if rollout else ()))
        nobody: AbstractContextManager[dict[int, list[torch.Tensor]]] = nullcontext({})
        with accountant.hidden.of(batch.micro_batches) if listens else nobody as heard:
            own = _score(step, batch.micro_batches, batch.normalizers[0], "none")
        replayed = _score(step, batch.micro_batches, batch.normalizers[0], "R3")
        if rollout:
            rows += [{"batch": number, "replay": scored.mode, **scored.metrics} for scored in (own, replayed)]
        accountant.before_updates(
            batch.micro_batches,
            engine_routes=replayed.log_probs,
            own=own.log_probs,
            own_routes=own.routes,
            heard=heard,
        )
        if updates:
            routes = step.routes(batch)
            after_log_probs = step.log_probs(batch, routes)
            step.updates(batch, routes, after_log_probs=after_log_probs, after_skip=lambda *_: None)
            accountant.after_updates(batch.micro_batches)
            link.push_weights(version=number)
        samples = rollout.batch.samples if rollout else ()
        accounts = accountant.accounts(batch.micro_batches, samples, prefilled or ())
        lines += [json.dumps(as_json(each, _texts(controller, each), number), ensure_ascii=False) for each in accounts]
    if controller is not None:
        (run_dir / FILE).write_text(json.dumps(rows, indent=1))
        (run_dir / ACCOUNT).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _texts(controller: Controller | None, account: SampleAccount) -> list[str]:
    """A response's tokens, each by itself."""
    if controller is None:
        raise RuntimeError("rank 0 alone has accounts and a tokenizer")
    return [str(controller.parts.tokenizer.decode([token])) for token in account.sample.response_ids]


@dataclass(frozen=True)
class _Scored:
    """A batch scored in one replay mode."""

    mode: str
    log_probs: list[torch.Tensor]
    """[R] of each micro-batch; empty but on the last pipeline stage."""
    routes: list[RouteTable | None]
    """Of each micro-batch, what the trainer's routers chose, where they chose by themselves."""
    metrics: dict[str, float]
    """On rank 0."""


def _score(step: TrainStep, micro_batches: list[MicroBatch], normalizer: Any, mode: str) -> _Scored:
    policy, objective = step.policy, step.objective
    for micro_batch in micro_batches:
        micro_batch.trainer_routes = None
    routes = StepRoutes(mode, policy, micro_batches, measure=True)
    outputs = policy.log_probs(micro_batches, routes=routes.log_prob_pass())
    routes.after_log_probs(micro_batches)
    metrics: dict[str, float] = {}
    if policy.rank_info.is_last_stage:
        loss = objective.loss_function(normalizer)
        reports = []
        for (log_probs, entropies), micro_batch in zip(outputs, micro_batches, strict=True):
            micro_batch.old_log_probs = log_probs
            micro_batch.router_shift = torch.ones_like(log_probs)  # π_θ is π_old
            reports.append(loss(log_probs, entropies, micro_batch)[1])
        metrics = objective.metrics(reports).all_reduce(data_context_parallel_group()).finalize()
    gathered = step.scatter.to_rank_zero(
        (metrics if policy.rank_info.reports else {}, routes.engine, routes.drift, 0, 0)
    )
    if gathered:
        metrics = next(report[0] for report in gathered if report[0])
        metrics |= route_metrics([report[1:] for report in gathered])
    routes_taken = [micro_batch.trainer_routes for micro_batch in micro_batches]
    return _Scored(mode, [output[0] for output in outputs], routes_taken, metrics)
