"""What the ranks of `test_weight_versions` run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layout_work import (
    build,
    micro_batches,
    policy_config,
    ragged_batch,
    weighted_loss,
    weights,
    with_random_routes,
)

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.sample import UNKNOWN_VERSION
from vespo_megatron.megatron import hf_weights
from vespo_megatron.megatron.policy import MegatronPolicy
from vespo_megatron.megatron.weight_history import WeightHistory
from vespo_megatron.recipe.schema import CheckpointingConfig, Recipe
from vespo_megatron.routing_replay.table import row_versions
from vespo_megatron.trainer.checkpoint import Checkpointer
from vespo_megatron.trainer.objective import Objective
from vespo_megatron.trainer.step import SlicedBatch, TrainStep

VERSIONS = 3
FACTS = {"weight_version": VERSIONS - 1}
ROUTER_SHIFT = {"loss_fn.router_shift.apply": "before_clip"}


def batch_of_versions(replay: str = "none") -> Batch:
    """Responses of one version, of two and of three; version 0 is in one response alone, and in its first tokens.

    With R3 routes are of a response's last version, as after it was run again; with "R3 spans" each row is of the
    version that drew its token.
    """
    batch = ragged_batch()
    if replay.startswith("R3"):
        with_random_routes(batch)
    for index, sample in enumerate(batch.samples):
        length = len(sample.response_ids)
        sample.weight_versions = np.full(length, 1 + index % 2)
        if index % 3 == 0 and length > 3:
            sample.weight_versions = np.repeat([1, 2], [length // 3, length - length // 3])
        if index == 2:
            sample.weight_versions = np.repeat([0, 1, 2], [10, 11, length - 21])
        sample.route_versions = np.full(sample.num_tokens - 1, sample.weight_versions[-1])
        if replay == "R3 spans":
            sample.route_versions = row_versions(sample)
    return batch


def recipe_of(
    folder: str,
    layout: dict[str, Any],
    *,
    behavior: str,
    replay: str = "none",
    world_size: int | None = None,
    **changes: Any,
) -> Recipe:
    """Two mini-batches of packed micro-batches, three versions of staleness."""
    return Recipe(policy=policy_config(folder, layout)).with_values(
        {
            "loss_fn.behavior": behavior,
            "grpo.async_grpo.enabled": True,
            "grpo.async_grpo.max_staleness": float(VERSIONS - 1),
            "grpo.num_prompts_per_step": 4,
            "grpo.num_generations_per_prompt": 4,
            "policy.train_global_batch_size": 8,
            "policy.sequence_packing.enabled": True,
            "policy.sequence_packing.train_mb_tokens": 72,
            "policy.router_replay.mode": replay.partition(" ")[0],
            "cluster.gpus_per_node": world_size or torch.distributed.get_world_size(),
            **changes,
        }
    )


def score(recipe: Recipe, policy: MegatronPolicy, batch: Batch, history: WeightHistory | None) -> SlicedBatch:
    """The step's own π_old pass, and routes, on the rollout batch."""
    step = TrainStep(recipe, policy, Objective(recipe.loss_fn, recipe.behavior), history=history)
    sliced = step.receive(batch if policy.rank_info.rank == 0 else None)
    assert step.log_probs(sliced, step.routes(sliced))
    return sliced


def collected(policy: MegatronPolicy, sliced: SlicedBatch) -> list[tuple] | None:
    """(layout, sample ids, π_old) of each micro-batch of this (data, context) shard."""
    if not policy.rank_info.reports:
        return None
    return [
        (each.layout, [s.sample_id for s in each.batch.samples], each.old_log_probs.numpy())
        for each in sliced.micro_batches
    ]


def score_by_version(
    folder: str, layout: dict[str, Any], store: str, scratch: str, replay: str = "none"
) -> dict[str, Any]:
    """Score a batch of three versions after weights have moved on; then each version from a folder of its own.

    Also: are the policy's weights what they were, and what does a checkpoint taken here hold.
    """
    policy = build(folder, layout, store)
    policy.optimizer.param_groups[0]["lr"] = policy.optimizer.param_groups[-1]["lr"] = 0.02
    recipe = recipe_of(folder, layout, behavior="version", replay=replay, **ROUTER_SHIFT)
    history = WeightHistory(policy, recipe.held_versions)
    batch = batch_of_versions(replay)
    live = TrainStep(recipe_of(folder, layout, behavior="rollout"), policy, Objective(recipe.loss_fn, "rollout"))
    to_train = live.receive(ragged_batch(1) if policy.rank_info.rank == 0 else None)
    for version in range(VERSIONS):
        with history.pushing(version):
            hf_weights.save(policy.exporter, f"{scratch}/{version}", copy_from=folder)
        policy.update(to_train.mini_batches[0], weighted_loss)
    assert history.live is None
    with history.pushing(VERSIONS - 1):  # once more, to a server that came back: what the number meant
        hf_weights.save(policy.exporter, f"{scratch}/again", copy_from=folder)
    before = [tensor.clone() for tensor in policy.weights()]
    sliced = score(recipe, policy, batch, history)
    unmoved = all(map(torch.equal, before, policy.weights()))
    checkpointer = Checkpointer(CheckpointingConfig(timeout=60.0), policy, Path(scratch) / "run")
    saved = checkpointer.save(1, FACTS, history=history, wait=True)
    differences, routes_equal = compare_with_folders(policy, sliced, batch, scratch, replay)
    return {
        "scored": collected(policy, sliced),
        "differences": differences,
        "routes_equal": routes_equal,
        "unmoved": unmoved and all(map(torch.equal, before, policy.weights())),
        "held": history.held,
        "saved": saved,
        "bytes": history.nbytes,
        "weight_bytes": sum(tensor.nbytes for tensor in policy.weights()),
        "forwards": sum(len(chosen) for each in sliced.version_passes for chosen in each.micro_batches),
        "micro_batches": len(sliced.micro_batches),
    }


def compare_with_folders(
    policy: MegatronPolicy, sliced: SlicedBatch, batch: Batch, scratch: str, replay: str
) -> tuple[list[float], bool]:
    """Per version: the largest difference to what another policy with that version's folder scores; and of routes."""
    differences, routes_equal = [], True
    for version in range(VERSIONS):
        other = MegatronPolicy(policy.config, policy.rank_info, model_folder=f"{scratch}/{version}")
        alone = recipe_of(str(policy.model_folder), {}, behavior="recompute", replay=replay).with_values(
            {"policy.megatron_cfg": policy.config.megatron_cfg} | ROUTER_SHIFT
        )
        expected = score(alone, other, replaying(batch, version) if replay == "R3 spans" else batch, None)
        worst = 0.0
        for ours, theirs in zip(sliced.micro_batches, expected.micro_batches, strict=True):
            samples = ours.batch.samples
            drawn = ours.layout.response_values([sample.weight_versions for sample in samples]) == version
            if policy.rank_info.is_last_stage and drawn.any():
                gap = (ours.old_log_probs - theirs.old_log_probs)[torch.from_numpy(drawn)]
                worst = max(worst, float(gap.abs().max()))
            rows = ours.layout.router_rows([row_versions(sample) for sample in samples], -1) == version
            for scores in ("experts", "log_probs"):  # what the routers of that version said
                one, other = getattr(ours.router_scores, scores), getattr(theirs.router_scores, scores)
                routes_equal &= np.array_equal(one[rows], other[rows])
            if replay == "R2":
                same = ours.trainer_routes.experts[rows] == theirs.trainer_routes.experts[rows]
                routes_equal &= bool(same.all())
        differences.append(worst)
    return differences, routes_equal


def replaying(batch: Batch, version: int) -> Batch:
    """The same batch, in which rows before the first of this version are stale, in responses that have it."""
    batch = copy.deepcopy(batch)
    for sample in batch.samples:
        if version in sample.weight_versions:
            sample.route_versions[row_versions(sample) < version] = UNKNOWN_VERSION
    return batch


def score_after_resume(folder: str, layout: dict[str, Any], store: str, run_dir: str) -> dict[str, Any]:
    """The same batch, by a policy that was loaded from the checkpoint."""
    policy = build(folder, layout, store)
    recipe = recipe_of(folder, layout, behavior="version")
    history = WeightHistory(policy, recipe.held_versions)
    checkpointer = Checkpointer(CheckpointingConfig(timeout=60.0), policy, Path(run_dir))
    checkpointer.load(checkpointer.find(), history)
    with history.pushing(VERSIONS - 1):
        pushed = [tensor.clone() for tensor in policy.weights()]
    held = [tensor.clone() for tensor in policy.weights()]
    sliced = score(recipe, policy, batch_of_versions(), history)
    return {
        "scored": collected(policy, sliced),
        "held": history.held,
        "pushed_is_not_live": not all(map(torch.equal, pushed, held)),
    }


def synchronous(folder: str, layout: dict[str, Any], store: str, replay: str) -> dict[str, Any]:
    """`version` against `recompute` in a synchronous run: π_old, routes, and what it costs."""
    policy = build(folder, layout, store)
    off = {"grpo.async_grpo.enabled": False}
    batch = batch_of_versions(replay)
    for sample in batch.samples:
        sample.weight_versions[:] = 7
        if sample.route_versions is not None:
            sample.route_versions[:] = 7
    recipe = recipe_of(folder, layout, behavior="version", replay=replay, **off)
    history = WeightHistory(policy, recipe.held_versions)
    with history.pushing(7):
        pass
    ours = score(recipe, policy, batch, history)
    theirs = score(recipe_of(folder, layout, behavior="recompute", replay=replay, **off), policy, batch, None)
    pairs = list(zip(ours.micro_batches, theirs.micro_batches, strict=True))
    return {
        "log_probs": all(torch.equal(a.old_log_probs, b.old_log_probs) for a, b in pairs)
        if policy.rank_info.is_last_stage
        else True,
        "routes": all(np.array_equal(a.trainer_routes.experts, b.trainer_routes.experts) for a, b in pairs)
        if replay == "R2"
        else True,
        "held": history.nbytes,
        "passes": len(ours.version_passes),
    }


def after_an_update(folder: str, layout: dict[str, Any], store: str) -> dict[str, Any]:
    """Weights as they are sent, and log-probs under weights of before, after one update and no forward since."""
    policy = build(folder, layout, store)
    batches = micro_batches(policy, ragged_batch())
    module = hf_weights.unwrap(policy.chunks[0])
    module.register_buffer("made_up_bias", torch.ones(2, 3))
    module.register_buffer("made_up_count", torch.ones(2), persistent=False)
    policy.keep_reference()
    before = policy.log_probs(batches)
    module.made_up_bias += 1
    module.made_up_count += 1
    with policy.under(policy._reference):
        buffers = [module.made_up_bias.sum().item(), module.made_up_count.sum().item()]
    buffers += [module.made_up_bias.sum().item()]
    policy.update(batches, weighted_loss)
    sent = weights(policy)
    policy.update(batches, weighted_loss)
    reference = policy.ref_log_probs(batches)
    return {
        "sent": sent,
        "buffers": buffers,
        "reference": all(map(torch.equal, before, reference)),
        "after": [float(output[0].sum()) for output in policy.log_probs(batches)],
    }
