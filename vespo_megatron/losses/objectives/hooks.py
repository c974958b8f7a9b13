"""Masks that compose with any φ."""

from __future__ import annotations

from torch import Tensor


def opsm_keep(sequence_advantage: Tensor, sequence_log_ratio: Tensor, lengths: Tensor, delta: float) -> Tensor:
    """Off-policy sequence mask (DeepSeek-V3.2, arXiv 2512.02556): bool [num_sequences], composes with any φ.

    False where A < 0 and mean_t(log μ − log π_θ) > δ: negatives the policy has already left. μ is the policy that drew
    the tokens, so that staleness and the engines' mismatch both count (TRL's choice, said in its GRPO trainer);
    `opsm_anchor: old` judges π_old. No correction is in it.
    """
    return ~((sequence_advantage < 0) & (-sequence_log_ratio / lengths.clamp(min=1) > delta))
