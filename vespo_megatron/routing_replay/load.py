"""Load of the experts: how many tokens each expert of each layer computes, and how far from even that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


class ExpertLoad:
    """Tokens of every expert in this rank's layers and rows, counted on the device without waiting for it.

    Args:
        layers: MoE layers of this rank.
        experts: of a layer, all of them: routers choose among all, whoever holds them.
    """

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self.counts = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        """int64 [layers, experts]"""

    def add(self, column: int, indices: torch.Tensor, is_real: torch.Tensor) -> None:
        """Count the experts `indices` [rows, topk] of one layer where `is_real` [rows]."""
        real = is_real.to(torch.int64)[:, None].expand_as(indices)
        self.counts[column].scatter_add_(0, indices.flatten(), real.flatten())


@dataclass(frozen=True)
class LayerLoad:
    """How one layer's tokens are spread over its experts in one batch."""

    max_violation: float
    """Load of the busiest expert over the mean load, less 1: 0 is even (MaxVio, arXiv 2408.15664)."""
    busiest_expert_share: float
    """Share of the layer's load that the busiest expert has."""
    dead_experts: float
    """Experts without a token."""


def layer_loads(counts: torch.Tensor) -> list[LayerLoad]:
    """One `LayerLoad` per row of `counts` [layers, experts]; the one wait for the device."""
    total = counts.sum(dim=-1).clamp(min=1).double()
    share = counts.amax(dim=-1).double() / total
    dead = (counts == 0).sum(dim=-1).double()
    rows = torch.stack([share * counts.shape[-1] - 1, share, dead], dim=-1).tolist()
    return [LayerLoad(*row) for row in rows]


_READ: dict[str, Callable[[LayerLoad], float]] = {
    "max_violation": lambda load: load.max_violation,
    "busiest_expert_share": lambda load: load.busiest_expert_share,
    "dead_experts": lambda load: load.dead_experts,
}


def load_metrics(updates: Sequence[Mapping[int, LayerLoad]], *, per_layer: bool) -> dict[str, float]:
    """`routes/max_violation`, `routes/busiest_expert_share`, `routes/dead_experts`: means over updates.

    Each is the mean over layers; `…_worst_layer` is that of the layer where it is largest, `…_layer_<n>` that of layer
    n (from 1).

    Args:
        updates: of each optimizer update, layer number → its load; the same layers in all.
        per_layer: whether every layer is a metric.
    """
    if not updates or not updates[0]:
        return {}
    metrics = {}
    for name, read in _READ.items():
        values = {layer: sum(read(update[layer]) for update in updates) / len(updates) for layer in sorted(updates[0])}
        metrics[f"routes/{name}"] = sum(values.values()) / len(values)
        metrics[f"routes/{name}_worst_layer"] = max(values.values())
        if per_layer:
            metrics |= {f"routes/{name}_layer_{layer}": value for layer, value in values.items()}
    return metrics
