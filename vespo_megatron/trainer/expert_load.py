"""Expert load of a step's optimizer updates, over ranks and pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from vespo_megatron.megatron.parallel import stage_group
from vespo_megatron.megatron.policy import MegatronPolicy, UpdateResult
from vespo_megatron.routing_replay.load import LayerLoad, layer_loads, load_metrics

StageLoad = list[dict[int, LayerLoad]]
"""Of each update, layer number → the load of that layer, over all of the update's tokens."""


def stage_load(results: Sequence[UpdateResult], policy: MegatronPolicy) -> StageLoad:
    """The load in this pipeline stage's layers, on one of its ranks; empty on the others. A collective of the stage.

    One sum over ranks and one wait for the device, whatever the number of updates and layers.
    """
    counts = [result.expert_load for result in results if result.expert_load is not None]
    layers = policy.replay.layer_numbers
    if not counts or not layers:
        return []
    stacked, group = torch.stack(counts), stage_group()
    if group.size() > 1:
        dist.all_reduce(stacked, group=group)
    if group.rank() > 0:
        return []
    flat = layer_loads(stacked.flatten(0, 1))
    return [dict(zip(layers, flat[start:], strict=False)) for start in range(0, len(flat), len(layers))]


def expert_load_metrics(reports: Sequence[StageLoad], *, per_layer: bool) -> dict[str, float]:
    """From every rank's `stage_load` to metrics: stages hold the same updates and different layers."""
    stages = [report for report in reports if report]
    updates = [
        {layer: load for stage in at_once for layer, load in stage.items()} for at_once in zip(*stages, strict=True)
    ]
    return load_metrics(updates, per_layer=per_layer)
