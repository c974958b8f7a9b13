"""The routers' own losses of a step's optimizer updates, over ranks and pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from vespo_megatron.megatron.parallel import stage_group
from vespo_megatron.megatron.policy import MegatronPolicy, UpdateResult

NAMES = ("load_balancing_loss", "z_loss")
"""As megatron-core logs them; the rows of `UpdateResult.router_losses`."""

StageLosses = dict[int, list[float]]
"""Layer number → its losses, each the mean over updates."""


def stage_losses(results: Sequence[UpdateResult], policy: MegatronPolicy) -> StageLosses:
    """The losses of this pipeline stage's layers, on one of its ranks; empty on the others. A collective of the stage.

    They are sums over tokens divided by all the update's tokens: ranks add up.
    """
    losses = [result.router_losses for result in results if result.router_losses is not None]
    layers = policy.replay.layer_numbers
    if not losses or not layers:
        return {}
    mean, group = torch.stack(losses).mean(0), stage_group()
    if group.size() > 1:
        dist.all_reduce(mean, group=group)
    return {} if group.rank() > 0 else dict(zip(layers, mean.t().tolist(), strict=True))


def router_loss_metrics(reports: Sequence[StageLosses], *, per_layer: bool) -> dict[str, float]:
    """From every rank's `stage_losses` to `routes/load_balancing_loss` and `routes/z_loss`, means over layers.

    One whose coefficient is 0 is 0 and says nothing: it is left out. `per_layer` makes every layer's a metric as well.
    """
    layers = {layer: losses for report in reports for layer, losses in report.items()}
    metrics = {}
    for index, name in enumerate(NAMES):
        values = {layer: layers[layer][index] for layer in sorted(layers)}
        if any(values.values()):
            metrics[f"routes/{name}"] = sum(values.values()) / len(values)
            if per_layer:
                metrics |= {f"routes/{name}_layer_{layer}": value for layer, value in values.items()}
    return metrics
