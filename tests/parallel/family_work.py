"""What workers do to the routers of a family's model."""

from __future__ import annotations

from typing import Any

import layout_work
import torch

from vespo_megatron.megatron.policy import RouteUse
from vespo_megatron.routing_replay.table import RouteTable


def gates(folder: str, layout: dict[str, Any], store: str) -> list[dict[str, torch.Tensor]]:
    """Of every MoE layer: what its router reads, weighs with and adds for the choice, and the gates [tokens, experts]
    it gives with live routes and with replayed ones, [tokens, topk]."""
    policy = layout_work.build(folder, layout, store)
    batches = layout_work.routed_micro_batches(
        policy, layout_work.with_random_routes(layout_work.ragged_batch(), layers=policy.shape.num_moe_layers), count=1
    )
    seen: list[dict[str, torch.Tensor]] = []

    def keep(router, given, out):
        bias = None if router.expert_bias is None else router.expert_bias.clone()
        seen.append({"input": given[0].flatten(0, 1), "weight": router.weight.detach(), "bias": bias, "gates": out[0]})

    hooks = [router.register_forward_hook(keep) for router in policy.replay.routers]
    live_table = policy.empty_routes(batches[0])
    policy.log_probs(batches, routes=RouteUse("record", lambda _each: (live_table, None)))
    live, seen = seen, []
    policy.log_probs(batches, routes=RouteUse("replay", lambda each: (each.engine_routes, None)))
    for hook in hooks:
        hook.remove()
    replayed = batches[0].engine_routes
    return [
        one | {"replayed": two["gates"], "replayed_input": two["input"]} | _chosen(live_table, replayed, column)
        for column, (one, two) in enumerate(zip(live, seen, strict=True))
    ]


def _chosen(live: RouteTable, replayed: RouteTable, column: int) -> dict[str, torch.Tensor]:
    """The experts of both passes, and which rows are not padding."""
    tables = {"live_experts": live, "replayed_experts": replayed}
    rows = {name: torch.from_numpy(table.experts[:, column].astype("int64")) for name, table in tables.items()}
    recorded = torch.ones(len(replayed.experts), dtype=torch.bool)
    recorded[torch.from_numpy(replayed.live_rows.astype("int64"))] = False
    return rows | {"recorded": recorded}


def bias_updates(folder: str, layout: dict[str, Any], store: str) -> dict[str, Any]:
    """Correction biases before and after an update on live routes, and each expert's tokens in it; rank 0 has them."""
    policy = layout_work.build(folder, layout | {"moe_router_bias_update_rate": 0.01}, store)
    before = {name: tensor for name, tensor in layout_work.weights(policy).items() if name.endswith("correction_bias")}
    policy.update(layout_work.micro_batches(policy, layout_work.ragged_batch()), layout_work.weighted_loss)
    after = {name: tensor for name, tensor in layout_work.weights(policy).items() if name in before}
    return {"before": before, "after": after}


def rounded_weights(folder: str, layout: dict[str, Any], store: str) -> dict[str, torch.Tensor]:
    """Every weight of a bfloat16 policy by HF name, on rank 0."""
    return layout_work.weights(layout_work.build(folder, layout, store, precision="bfloat16"))


def refused_update(folder: str, layout: dict[str, Any], store: str) -> dict[str, torch.Tensor]:
    """Biases before, after gradients alone and an update that is refused: [2, experts] by HF name."""
    policy = layout_work.build(folder, layout | {"moe_router_bias_update_rate": 0.01}, store)
    batches = layout_work.micro_batches(policy, layout_work.ragged_batch())
    before = layout_work.weights(policy)
    policy.compute_gradients(batches, layout_work.weighted_loss)
    policy.update(batches, layout_work.weighted_loss, before_step=lambda _reports: False)
    after = layout_work.weights(policy)
    return {name: torch.stack([tensor, after[name]]) for name, tensor in before.items() if "correction_bias" in name}
