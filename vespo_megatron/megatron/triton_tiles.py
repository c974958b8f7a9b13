"""`logit_tiles` on a GPU: one Triton kernel each, where PyTorch's operations go over a tile about a dozen times.

A tile is read once for its statistics, and read and written once for its gradient.
Checked in Triton's interpreter on a CPU (`make test-triton`), and on an H100 (docs/gpu.md).
Imported only where a GPU and Triton are (PyTorch's CUDA builds bring it).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_BLOCK = 4096
"""Columns that one program holds at a time."""


@triton.jit
def _softmax_statistics_kernel(
    tile,
    column,
    statistics,
    target,
    width,
    between_statistics,
    TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits = tile + row * width
    lanes = tl.arange(0, BLOCK)
    # Lower than any logit, and far enough from the lowest number for a difference to be finite.
    peak = tl.full([], -1e38, DTYPE)
    total = tl.full([], 0.0, DTYPE)
    weighted = tl.full([], 0.0, DTYPE)
    for start in range(0, width, BLOCK):
        here = start + lanes < width
        z = tl.load(logits + start + lanes, mask=here, other=0.0).to(DTYPE) / TEMPERATURE
        top = tl.maximum(peak, tl.max(tl.where(here, z, -1e38), 0))
        below = peak - top
        share = tl.exp(below)
        z = tl.where(here, z - top, 0.0)
        e = tl.where(here, tl.exp(z), 0.0)
        weighted = share * (weighted + total * below) + tl.sum(z * e, 0)
        total = share * total + tl.sum(e, 0)
        peak = top
    place = statistics + row
    tl.store(place, peak)
    tl.store(place + between_statistics, total)
    tl.store(place + 2 * between_statistics, weighted)
    at = tl.load(column + row)
    inside = (at >= 0) & (at < width)
    found = tl.load(logits + at, mask=inside, other=0.0).to(DTYPE) / TEMPERATURE
    tl.store(target + row, found, mask=inside)


@triton.jit
def _logit_gradient_kernel(
    tile,
    column,
    log_sum,
    slopes,
    entropy,
    width,
    between_slopes,
    WITH_ENTROPY: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = lanes < width
    place = tile + row * width + lanes
    z = tl.load(place, mask=here, other=0.0).to(DTYPE) / TEMPERATURE - tl.load(log_sum + row)
    of_log_prob = tl.load(slopes + row)
    slope = tl.zeros([BLOCK], DTYPE) + of_log_prob
    if WITH_ENTROPY:
        slope += tl.load(slopes + between_slopes + row) * (z + tl.load(entropy + row))
    turned = tl.where(lanes == tl.load(column + row), of_log_prob, 0.0) - slope * tl.exp(z)
    tl.store(place, turned.to(tile.dtype.element_ty), mask=here)


def softmax_statistics(
    tile: torch.Tensor,
    column: torch.Tensor,
    temperature: float,
    statistics: torch.Tensor,
    target: torch.Tensor,
    *,
    kept: bool,
) -> None:
    """See `logit_tiles.softmax_statistics`."""
    del kept  # the kernel leaves the tile as it is
    rows, width = tile.shape
    if rows:
        _softmax_statistics_kernel[(rows,)](
            tile,
            column,
            statistics,
            target,
            width,
            statistics.stride(0),
            TEMPERATURE=temperature,
            BLOCK=_block(width),
            DTYPE=_accurate(tile),
        )


def logit_gradient_(
    tile: torch.Tensor,
    column: torch.Tensor,
    temperature: float,
    log_sum: torch.Tensor,
    slopes: torch.Tensor,
    entropy: torch.Tensor | None,
) -> None:
    """See `logit_tiles.logit_gradient_`."""
    rows, width = tile.shape
    if rows:
        block = _block(width)
        _logit_gradient_kernel[(rows, triton.cdiv(width, block))](
            tile,
            column,
            log_sum,
            slopes,
            log_sum if entropy is None else entropy,
            width,
            slopes.stride(0),
            WITH_ENTROPY=entropy is not None,
            TEMPERATURE=temperature,
            BLOCK=block,
            DTYPE=_accurate(tile),
        )


def _block(width: int) -> int:
    return min(triton.next_power_of_2(width), MAX_BLOCK)


def _accurate(tile: torch.Tensor) -> tl.dtype:
    return tl.float64 if tile.dtype == torch.float64 else tl.float32
