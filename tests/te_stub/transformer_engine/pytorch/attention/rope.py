"""Stand-in for pytorch/attention/rope.py:346: rotary embedding of packed sequences in one call."""

from __future__ import annotations

import torch

from .dot_product_attention import positions

calls: list[int] = []
"""Tokens of every call, for tests."""


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    tensor_format: str = "sbhd",
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> torch.Tensor:
    """`t` [T, heads, d] of this rank, `freqs` [positions, 1, 1, d]."""
    assert fused and tensor_format == "thd" and not interleaved and freqs.shape[1:3] == (1, 1)
    assert freqs.dtype == torch.float32 and cu_seqlens.dtype == torch.int32
    calls.append(len(t))
    angles = freqs[positions(cu_seqlens, cp_size, cp_rank)[:, 1], 0]
    first, second = t.chunk(2, dim=-1)
    return t * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
