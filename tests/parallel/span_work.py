"""What the ranks of `test_route_spans` run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from layout_work import build, gradients, ragged_batch, routed_micro_batches, weighted_loss, with_random_routes

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.sample import UNKNOWN_VERSION
from vespo_megatron.megatron import hf_weights
from vespo_megatron.megatron.policy import RouteUse
from vespo_megatron.routing_replay.table import apply_stale_policy, row_versions

RETRACTED = 2
"""Of the batch, the response that was retracted after its second span."""


def batch_of_spans() -> Batch:
    """Random routes, responses of one to three versions; of `RETRACTED` only the last span's rows are known."""
    batch = with_random_routes(ragged_batch())
    for index, sample in enumerate(batch.samples):
        length = len(sample.response_ids)
        spans = index % 3 + 1
        sample.weight_versions = np.sort(np.arange(length) % spans + 4)
        sample.route_versions = row_versions(sample)
        if index == RETRACTED:
            sample.route_versions[sample.route_versions != sample.weight_versions[-1]] = UNKNOWN_VERSION
    return batch


def replay_spans(folder: str, layout: dict[str, Any], store: str, on_stale_routes: str = "live") -> dict[str, Any]:
    """Gradients under replay of spans; and, in one process, what each router did with each token."""
    policy = build(folder, layout, store)
    batch = batch_of_spans()
    found = apply_stale_policy(batch.samples, on_stale_routes)
    batches = routed_micro_batches(policy, batch)
    use = RouteUse("replay", lambda each: (each.engine_routes, None))
    seen: dict[int, list[torch.Tensor]] = {}

    def remember(router, _inputs, output):
        seen.setdefault(router.layer_number, []).append(output[1].clone())

    handles = [
        layer.mlp.router.register_forward_hook(remember)
        for chunk in policy.chunks
        for layer in hf_weights.unwrap(chunk).decoder.layers
        if hasattr(layer.mlp, "router")
    ]
    answer = gradients(policy, batches, weighted_loss, use) | {"found": found}
    for handle in handles:
        handle.remove()
    if not layout:
        answer["chosen"] = {
            sample.sample_id: torch.stack([seen[layer][index][start : start + sample.num_tokens] for layer in seen], 1)
            for index, each in enumerate(batches)
            for start, sample in zip(each.layout.cu_seqlens.tolist(), each.batch.samples, strict=False)
        }
    return answer
