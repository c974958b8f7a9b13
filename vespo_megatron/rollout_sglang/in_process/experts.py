"""An expert at a time: in a decoding step on the host, where its weights are what takes the time; and with rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_FEW = 8
"""Rows of an expert, on average, up to which the product is quicker with the weight on the left: x·Wᵀ for one to eight
rows takes MKL two to three times as long as W·xᵀ, for more of them the same."""


def run_experts(
    experts: Any,
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    gates: torch.Tensor,
    rounded: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """transformers' experts: hidden [T, H], chosen experts and gates [T, k] → [T, H].

    Args:
        rounded: what `down_proj` reads of its input [rows, channels]; `hidden` is rounded by the caller.
    """
    few = hidden.device.type == "cpu" and chosen.numel() <= _FEW * experts.num_experts
    if rounded is None and not few:
        return experts(hidden, chosen, gates)
    expert, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(experts.num_experts + 1, device=hidden.device)
    counts = torch.searchsorted(expert, numbers).diff().tolist()
    gate, up = _products(hidden[order // chosen.shape[1]], experts.gate_up_proj, counts).chunk(2, dim=-1)
    inner = experts.act_fn(gate) * up
    products = hidden.new_empty(len(order), hidden.shape[1])
    products[order] = _products(inner if rounded is None else rounded(inner), experts.down_proj, counts)
    return torch.bmm(gates[:, None], products.view(len(hidden), -1, hidden.shape[1]))[:, 0]


def _products(rows: torch.Tensor, weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """rows [S, K] sorted by expert, weights [E, N, K], how many rows each expert has → [S, N]."""
    result = rows.new_empty(len(rows), weights.shape[1])
    parts = zip(rows.split(counts), result.split(counts), weights, counts, strict=True)
    for own, target, weight, count in parts:
        if count:
            target.copy_(torch.mm(weight, own.t()).t())
    return result
