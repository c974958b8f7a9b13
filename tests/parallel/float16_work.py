"""What the ranks of `test_float16` do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layout_work
import torch
from layout_work import build, micro_batches, ragged_batch, weighted_loss, weights

from vespo_megatron.megatron import checkpoint as policy_checkpoint
from vespo_megatron.megatron.policy import MegatronPolicy, RouteUse

OVERFLOWS = {"optimizer.initial_loss_scale": 2.0**32, "optimizer.hysteresis": 1}
ENGINE = RouteUse("replay", lambda each: (each.engine_routes, None))


def computed(folder: str, layout: dict[str, Any], store: str, precision: str) -> dict[str, Any]:
    """Loss, gradients, their norm and the update's change, all with the same routes in either precision."""
    policy = build(folder, layout, store, precision=precision)
    batches = layout_work.routed_micro_batches(policy, layout_work.with_random_routes(ragged_batch()))
    answers = layout_work.gradients(policy, batches, weighted_loss, ENGINE)
    before = weights(policy)
    result = policy.update(batches, weighted_loss, routes=ENGINE)
    change = {name: tensor.float() - before[name].float() for name, tensor in weights(policy).items()}
    return answers | {"grad_norm": result.grad_norm, "update": change, "succeeded": result.succeeded}


def router_losses(folder: str, layout: dict[str, Any], store: str, precision: str) -> dict[str, Any]:
    """Values and every gradient of the routers' own losses and nothing else."""
    settings = {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "moe_z_loss_coeff": 0.01,
    }
    policy = build(folder, layout | settings, store, precision=precision)
    batches = micro_batches(policy, ragged_batch())
    with policy._penalised(batches):
        found = layout_work.gradients(policy, batches, lambda log_probs, *_: (0.0 * log_probs.sum(), torch.zeros(())))
    return found["gradients"]


def overflowing(folder: str, layout: dict[str, Any], store: str, updates: int = 24) -> list[dict[str, Any]]:
    """Updates from a scale at which gradients overflow: what each was, and whether any local weight has moved."""
    policy = build(folder, {"scheduler.lr_warmup_iters": 30} | layout | OVERFLOWS, store, precision="float16")
    batches, rows = micro_batches(policy, ragged_batch()), []
    for _ in range(updates):
        before = [weight.clone() for weight in policy.weights()]
        result = policy.update(batches, weighted_loss)
        after = policy.weights()
        rows.append(
            {
                "overflowed": result.overflowed,
                "succeeded": result.succeeded,
                "scale": result.loss_scale,
                "next": policy.loss_scale.value,
                "rate": result.learning_rate,
                "taken": policy.updates_taken,
                "norm": result.grad_norm,
                "moved": any(not torch.equal(one, other) for one, other in zip(before, after, strict=True)),
            }
        )
    return rows


def one_kind_overflows(folder: str, layout: dict[str, Any], store: str, kind: str) -> dict[str, Any]:
    """An update in which an expert's gradient alone, or a dense one's, is infinite on one rank; then a good one."""
    policy = build(folder, layout | {"optimizer.hysteresis": 1}, store, precision="float16")
    batches = micro_batches(policy, ragged_batch())
    before = weights(policy)

    def spoil(_reports: Any) -> bool:
        chunk = policy.chunks[0]
        buffers = chunk.expert_parallel_buffers if kind == "expert" else chunk.buffers
        if policy.rank_info.rank == 0:
            buffers[0].grad_data.fill_(torch.inf)
        return True

    scale = policy.loss_scale.value
    spoilt = policy.update(batches, weighted_loss, before_step=spoil)
    equal = all(torch.equal(tensor, before[name]) for name, tensor in weights(policy).items())
    good = policy.update(batches, weighted_loss)
    return {
        "skipped": spoilt.overflowed and not spoilt.succeeded and equal,
        "scales": (scale, good.loss_scale),
        "norm": good.grad_norm,
    }


def norm_in_float32(folder: str, layout: dict[str, Any], store: str) -> dict[str, float]:
    """Of the gradients of the same update."""
    policy = build(folder, layout, store)
    return {"grad_norm": policy.update(micro_batches(policy, ragged_batch()), weighted_loss).grad_norm}


def _state(policy: MegatronPolicy) -> dict[str, Any]:
    """All that the next update depends on: on rank 0 the weights, everywhere the scale and its counters."""
    scale = policy.loss_scale
    return {"weights": weights(policy), "scale": scale.state_dict() | {"scale": scale.value}}


def save_among_overflows(folder: str, layout: dict[str, Any], store: str, checkpoint: str) -> list[dict[str, Any]]:
    """Seven updates at scales that double and overflow, a checkpoint, seven more: what it was then and after."""
    policy = build(folder, layout | _RESTLESS, store, precision="float16")
    batches = micro_batches(policy, ragged_batch())
    _updates(policy, batches)
    policy_checkpoint.save(policy, Path(checkpoint))()
    return [_state(policy), _updates(policy, batches) | _state(policy)]


def go_on(folder: str, layout: dict[str, Any], store: str, checkpoint: str) -> list[dict[str, Any]]:
    """The same of a policy that loads the checkpoint."""
    policy = build(folder, layout | _RESTLESS, store, precision="float16")
    policy_checkpoint.load(policy, Path(checkpoint), same_layout=True)
    return [_state(policy), _updates(policy, micro_batches(policy, ragged_batch())) | _state(policy)]


_RESTLESS = {"optimizer.initial_loss_scale": 2.0**20, "optimizer.hysteresis": 2, "optimizer.loss_scale_window": 2}


def _updates(policy: MegatronPolicy, batches: list[Any]) -> dict[str, Any]:
    results = [policy.update(batches, weighted_loss) for _ in range(7)]
    return {"overflowed": [each.overflowed for each in results], "scales": [each.loss_scale for each in results]}


def from_another_precision(folder: str, layout: dict[str, Any], store: str, checkpoint: str) -> dict[str, Any]:
    """A bfloat16 policy's checkpoint goes on in float16, and that one's in bfloat16."""
    policy = build(folder, layout, store, precision="bfloat16")
    batches = micro_batches(policy, ragged_batch())
    policy.update(batches, weighted_loss)
    for name in ("one", "two"):
        (Path(checkpoint) / name).mkdir()
    main = _main_weights(policy)
    policy_checkpoint.save(policy, Path(checkpoint) / "one")()
    half = build_again(policy, "float16")
    policy_checkpoint.load(half, Path(checkpoint) / "one", same_layout=True)
    equal = all(torch.equal(one, other) for one, other in zip(main, _main_weights(half), strict=True))
    result = half.update(batches, weighted_loss)
    policy_checkpoint.save(half, Path(checkpoint) / "two")()
    again = build_again(policy, "bfloat16")
    policy_checkpoint.load(again, Path(checkpoint) / "two", same_layout=True)
    return {"equal": equal, "taken": [result.succeeded, again.update(batches, weighted_loss).succeeded]}


def build_again(policy: MegatronPolicy, precision: str) -> MegatronPolicy:
    return MegatronPolicy(policy.config.with_values({"precision": precision}), policy.rank_info)


def _main_weights(policy: MegatronPolicy) -> list[torch.Tensor]:
    return [
        tensor.clone()
        for part in policy.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for tensor in group["params"]
    ]


def too_large(folder: str, layout: dict[str, Any], store: str) -> str:
    """What is said of a folder that float16 cannot hold."""
    from vespo_megatron.errors import UserError

    try:
        build(folder, layout, store, precision="float16")
    except UserError as error:
        return str(error)
    return ""
