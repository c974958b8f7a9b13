"""What several φ are made of: PPO's clip of a ratio, bounds for negatives, truncation, constants by the sign of A."""

from __future__ import annotations

import torch
from torch import Tensor

from vespo_megatron.losses.ratios import LOG_RATIO_CLAMP


def clipped_ratio(
    log_ratio: Tensor, advantage: Tensor, low: float | Tensor, high: float | Tensor, dual_clip: float | None = None
) -> Tensor:
    """PPO's φ: ρ where the clipped surrogate has a gradient, else 0; shapes as given.

    A ≥ 0: ρ·1[ρ ≤ high]. A < 0: ρ·1[low ≤ ρ], and ρ ≤ dual_clip where one is set (arXiv 1912.09729). ρ is at most e^20.
    """
    ratio = log_ratio.clamp(max=LOG_RATIO_CLAMP).exp()
    keep_negative = ratio >= low
    if dual_clip is not None:
        keep_negative &= ratio <= dual_clip
    return torch.where(torch.where(advantage >= 0, ratio <= high, keep_negative), ratio, 0.0)


def bounded_for_negatives(phi: Tensor, ratio: Tensor, advantage: Tensor, bound: float | None) -> Tensor:
    """`phi`, 0 where A < 0 and the ratio is above the bound, where there is one; shapes as given."""
    return phi if bound is None else torch.where((advantage < 0) & (ratio > bound), 0.0, phi)


SMALLEST_ADVANTAGE = 1e-6


def divisor(advantage: Tensor) -> Tensor:
    """A to divide by, at least `SMALLEST_ADVANTAGE` away from 0 on its own side; shape as given."""
    size = advantage.abs().clamp(min=SMALLEST_ADVANTAGE)
    return torch.where(advantage >= 0, size, -size)


def by_sign(advantage: Tensor, positive: float, negative: float) -> Tensor:
    """`positive` where A ≥ 0, `negative` elsewhere, in the type of `advantage` and of its shape."""
    return torch.where(advantage >= 0, advantage.new_full((), positive), advantage.new_full((), negative))


def at_most(values: Tensor, cap: float | None) -> Tensor:
    """`values`, truncated where there is a cap."""
    return values if cap is None else values.clamp(max=cap)
