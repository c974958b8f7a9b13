"""Rotary embedding stretched for long contexts."""

from __future__ import annotations

import math

import torch

from vespo_megatron.families.shape import RopeScaling


def stretched(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1's rule for angles per token, float [rotary_dim / 2].

    By how often a frequency turns within the original context: at least `high_freq_factor` times, it stays; at most
    `low_freq_factor` times, it is divided by `factor`; between them the two are mixed in proportion.

    megatron-core has the same rule with the last three numbers fixed (rotary_pos_embedding.py:113), on one device.
    Source: `rope_type: llama3` of transformers' `modeling_rope_utils`.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequencies / scaling.factor, frequencies, kept.clamp(0, 1))
