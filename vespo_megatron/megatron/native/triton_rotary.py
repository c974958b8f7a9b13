"""Rotary embedding of queries and keys in one pass each, on a GPU, where megatron-core's own makes about ten.

Cosines and sines are of a micro-batch, in float32, not of a layer. Imported only where a GPU and Triton are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    stride_token,
    stride_head,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    SIGN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    here = (head < HEADS) & (lane < HALF)
    c = tl.load(cos + token * HALF + lane)
    s = tl.load(sin + token * HALF + lane) * SIGN
    place = x + token * stride_token + head * stride_head + lane
    first = tl.load(place, mask=here, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=here, other=0.0).to(tl.float32)
    target = out + token * (HEADS * HALF * 2) + head * (HALF * 2) + lane
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=here)
    tl.store(target + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=here)


class _Rotate(torch.autograd.Function):
    """x [T, heads, head_dim], cos and sin float32 [T, head_dim / 2] → x turned."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, -1.0), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    x = x if x.stride(2) == 1 else x.contiguous()
    tokens, heads, _ = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens:
        _rotate_kernel[(tokens,)](
            x,
            cos,
            sin,
            out,
            x.stride(0),
            x.stride(1),
            HEADS=heads,
            BLOCK=triton.next_power_of_2(heads),
            HALF=cos.shape[1],
            SIGN=sign,
        )
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, head_dim], cos and sin float32 [T, head_dim / 2] → x turned; head_dim / 2 a power of two."""
    return _Rotate.apply(x, cos, sin)
