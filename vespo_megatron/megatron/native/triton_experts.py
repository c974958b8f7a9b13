"""What stands between an expert layer's products, on a GPU: one Triton kernel where PyTorch makes up to a dozen passes.

Rows are read once and written once, and summed in float32. Imported only where a GPU and Triton are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 4, 256
"""A program's block: 2 KiB of bfloat16, loaded 16 bytes a thread."""


@triton.jit
def _swiglu_kernel(gate_up, probs, out, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    scale = tl.load(probs + row, mask=real, other=0.0).to(tl.float32)[:, None]
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        here = real[:, None] & (column < WIDTH)[None, :]
        place = row[:, None] * (2 * WIDTH) + column[None, :]
        gate = tl.load(gate_up + place, mask=here, other=0.0).to(tl.float32)
        up = tl.load(gate_up + place + WIDTH, mask=here, other=0.0).to(tl.float32)
        active = gate * tl.sigmoid(gate) * up * scale
        tl.store(out + row[:, None] * WIDTH + column[None, :], active.to(out.dtype.element_ty), mask=here)


@triton.jit
def _swiglu_gradient_kernel(
    gate_up,
    probs,
    slope,
    active,
    gate_up_gradient,
    probs_gradient,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    scale = tl.load(probs + row, mask=real, other=0.0).to(tl.float32)[:, None]
    dtype = active.dtype.element_ty
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        here = real[:, None] & (column < WIDTH)[None, :]
        narrow = row[:, None] * WIDTH + column[None, :]
        place = row[:, None] * (2 * WIDTH) + column[None, :]
        gate = tl.load(gate_up + place, mask=here, other=0.0).to(tl.float32)
        up = tl.load(gate_up + place + WIDTH, mask=here, other=0.0).to(tl.float32)
        above = tl.load(slope + narrow, mask=here, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += tl.sum(above * silu * up, 1)
        tl.store(active + narrow, (silu * up * scale).to(dtype), mask=here)
        above = above * scale
        # silu' = sigmoid + silu · (1 − sigmoid)
        of_gate = above * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(gate_up_gradient + place, of_gate.to(dtype), mask=here)
        tl.store(gate_up_gradient + place + WIDTH, (above * silu).to(dtype), mask=here)
    tl.store(probs_gradient + row, total.to(probs_gradient.dtype.element_ty), mask=real)


@triton.jit
def _sum_rows_kernel(rows, positions, out, WIDTH: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for number in tl.static_range(COUNT):
        row = tl.load(positions + token * COUNT + number).to(tl.int64)
        total += tl.load(rows + row * WIDTH + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=here)


def swiglu(gate_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """[T, 2F] (gate beside up), [T] → [T, F]: probs · silu(gate) · up."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if rows:
        _swiglu_kernel[(triton.cdiv(rows, ROWS),)](gate_up, probs, out, rows, WIDTH=width, ROWS=ROWS, COLUMNS=COLUMNS)
    return out


def swiglu_gradient(
    gate_up: torch.Tensor, probs: torch.Tensor, slope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`swiglu` once more, and the gradients of `gate_up` and `probs`; `slope` [T, F] is its result's."""
    rows, width = slope.shape
    active, gate_up_gradient = torch.empty_like(slope), torch.empty_like(gate_up)
    probs_gradient = torch.empty_like(probs)
    if rows:
        _swiglu_gradient_kernel[(triton.cdiv(rows, ROWS),)](
            gate_up,
            probs,
            slope,
            active,
            gate_up_gradient,
            probs_gradient,
            rows,
            WIDTH=width,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )
    return active, gate_up_gradient, probs_gradient


def sum_rows(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """rows [N, H], int [T, k] → [T, H]: Σ over k of rows[positions]."""
    tokens, count = positions.shape
    width = rows.shape[1]
    out = rows.new_empty(tokens, width)
    if tokens:
        block = min(triton.next_power_of_2(width), 2048)
        _sum_rows_kernel[(tokens, triton.cdiv(width, block))](
            rows, positions, out, WIDTH=width, COUNT=count, BLOCK=block
        )
    return out
