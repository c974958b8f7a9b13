"""Search for M2PO's bound on (log ρ)² (arXiv 2510.01161)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vespo_megatron.losses.ratios import Ratios
from vespo_megatron.losses.search import counted_tokens


@dataclass(frozen=True)
class SecondMomentSearch:
    """The largest bound for which the mean of what is within it is below a threshold."""

    m2_threshold: float = 0.04
    gathers: ClassVar = True
    finds: ClassVar[tuple[str, ...]] = ("m2_max",)

    def contributions(self, ratios: Ratios) -> Tensor:
        """[1, tokens]: (log ρ)²."""
        return counted_tokens(ratios, [ratios.log_ratio.square()])

    def found(self, contributions: Tensor) -> dict[str, Tensor]:
        """`m2_max` []: of values that are equal all are kept or none; at least the smallest are."""
        values = contributions[0].sort().values
        if not len(values):
            return {"m2_max": values.new_zeros(())}
        means = values.cumsum(0) / torch.arange(1, len(values) + 1, device=values.device)
        below = int((means < self.m2_threshold).sum())  # means of sorted values only rise
        return {"m2_max": values[max(below - 1, 0)]}
