"""Sums of log-probs and of log-ratios over each sequence, in one pass over the tokens.

An objective whose φ is one number per sequence looks at no token again: forward reads log π and log μ once, backward
writes the gradient once, and nothing of the tokens' size is kept in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vespo_megatron.losses.sequence import PackedSequences, numpy_or_none

BLOCK_TOKENS = 1 << 17
"""Tokens of one block on the host: its differences stay in the processor's cache."""


@dataclass(frozen=True)
class RatioSums:
    """Sums over each sequence's unmasked tokens on this rank; every tensor [num_sequences], in the tokens' type."""

    log_probs: Tensor
    """Σ log π"""
    raw: Tensor
    """Σ (log π − log anchor)"""
    clamped: Tensor
    """The same with every term clamped."""


def ratio_sums(
    sequences: PackedSequences, log_probs: Tensor, anchor: Tensor, mask: Tensor | None, bound: float
) -> RatioSums:
    """See `RatioSums`. `log_probs` and `anchor` are float32 or float64 [tokens], `mask` bool [tokens]."""
    if sequences.on_host and numpy_or_none() is not None:
        return _by_blocks(sequences, log_probs, anchor, mask, bound)
    if sequences.uses_triton:
        from vespo_megatron.losses import triton_sums

        return RatioSums(*triton_sums.sums(log_probs, anchor, mask, sequences.offsets, sequences.longest, bound))
    difference = log_probs - anchor
    if mask is not None:
        difference, log_probs = torch.where(mask, difference, 0.0), torch.where(mask, log_probs, 0.0)
    raw = sequences.local_sum(difference)
    return RatioSums(sequences.local_sum(log_probs), raw, sequences.local_sum(difference.clamp_(-bound, bound)))


def expand(sequences: PackedSequences, values: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Give every unmasked token its sequence's value, the others 0: [num_sequences] → [tokens] of `dtype`."""
    if sequences.uses_triton:
        from vespo_megatron.losses import triton_sums

        return triton_sums.expand(values, mask, sequences.offsets, sequences.longest, sequences.num_tokens, dtype)
    expanded = sequences.expand(values).to(dtype)
    return expanded if mask is None else expanded * mask


def _by_blocks(
    sequences: PackedSequences, log_probs: Tensor, anchor: Tensor, mask: Tensor | None, bound: float
) -> RatioSums:
    """On the host: blocks of tokens; differences are summed in float64, log-probs pairwise in their own type."""
    numpy = numpy_or_none()
    add = numpy.add.reduceat
    sums = numpy.zeros((3, sequences.num_sequences))
    buffer = torch.empty(min(BLOCK_TOKENS, sequences.num_tokens), dtype=torch.float64)
    for begin in range(0, sequences.num_tokens, BLOCK_TOKENS):
        block = slice(begin, min(begin + BLOCK_TOKENS, sequences.num_tokens))
        rows, starts = sequences.in_block(block)
        values = log_probs[block]
        difference = torch.sub(values, anchor[block], out=buffer[: len(values)])
        if mask is not None:
            difference = torch.where(mask[block], difference, 0.0)
            values = torch.where(mask[block], values, 0.0)
        with numpy.errstate(invalid="ignore", over="ignore"):  # what is not finite is found in the sums
            raw = clamped = add(difference.numpy(), starts)
            # Where the squares sum to less than one term beyond the bound would, there is none. NaN is never less.
            if not torch.dot(difference, difference).item() <= bound**2:
                clamped = add(difference.clamp_(-bound, bound).numpy(), starts)
            for row, part in zip(sums, (add(values.numpy(), starts), raw, clamped), strict=True):
                row[rows] += part
    return RatioSums(*torch.from_numpy(sums).to(log_probs.dtype))
