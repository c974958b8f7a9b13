"""`ratio_sums` on a GPU: one Triton kernel for the sums, one for their gradient.

Per float32 token 8 bytes are read and 4 written.

Checked in Triton's interpreter on a CPU (`make test-triton`), and on an H100 (docs/gpu.md). Imported only where a GPU
and Triton are (PyTorch's CUDA builds bring it).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
TOKENS_PER_PROGRAM = 8192
"""A response longer than this is summed by several programs: long responses keep every multiprocessor busy."""


@triton.jit
def _sum_kernel(
    log_probs,
    anchor,
    mask,
    offsets,
    out,
    bound,
    num_sequences,
    HAS_MASK: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    begin = tl.load(offsets + row) + part * SPAN
    end = tl.minimum(tl.load(offsets + row + 1), begin + SPAN)
    lanes = tl.arange(0, BLOCK)
    values = tl.zeros([BLOCK], DTYPE)
    raw = tl.zeros([BLOCK], DTYPE)
    clamped = tl.zeros([BLOCK], DTYPE)
    for start in range(begin, end, BLOCK):
        here = start + lanes < end
        if HAS_MASK:
            here = here & tl.load(mask + start + lanes, mask=here, other=0).to(tl.int1)
        log_prob = tl.load(log_probs + start + lanes, mask=here, other=0.0).to(DTYPE)
        difference = log_prob - tl.load(anchor + start + lanes, mask=here, other=0.0).to(DTYPE)
        # A comparison keeps NaN, which a sequence's sum must show; minimum and maximum drop it.
        bounded = tl.where(difference > bound, bound, tl.where(difference < -bound, -bound, difference))
        values += log_prob
        raw += difference
        clamped += bounded
    place = out + part * 3 * num_sequences + row
    tl.store(place, tl.sum(values, 0))
    tl.store(place + num_sequences, tl.sum(raw, 0))
    tl.store(place + 2 * num_sequences, tl.sum(clamped, 0))


@triton.jit
def _expand_kernel(values, mask, offsets, out, HAS_MASK: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    row, part = tl.program_id(0), tl.program_id(1)
    begin = tl.load(offsets + row) + part * SPAN
    end = tl.minimum(tl.load(offsets + row + 1), begin + SPAN)
    value = tl.load(values + row)
    lanes = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        here = start + lanes < end
        token_values = tl.zeros([BLOCK], value.dtype) + value
        if HAS_MASK:
            keep = tl.load(mask + start + lanes, mask=here, other=0).to(tl.int1)
            token_values = tl.where(keep, token_values, 0.0)
        tl.store(out + start + lanes, token_values.to(out.dtype.element_ty), mask=here)


def sums(log_probs: Tensor, anchor: Tensor, mask: Tensor | None, offsets: Tensor, longest: int, bound: float) -> Tensor:
    """[3, num_sequences]: Σ log π, Σ (log π − log anchor) and the same clamped, over unmasked tokens.

    The same bits every time: parts of a long response are added in a fixed order, in float64.

    Args:
        log_probs, anchor: float32 or float64 [tokens].
        mask: bool [tokens].
        offsets: int64 [num_sequences + 1], on the tokens' device.
        longest: tokens of the longest sequence.
    """
    count, parts = len(offsets) - 1, max(1, triton.cdiv(longest, TOKENS_PER_PROGRAM))
    out = log_probs.new_empty(parts, 3, count)
    dtype = tl.float64 if log_probs.dtype == torch.float64 else tl.float32
    if count:
        given = log_probs if mask is None else mask
        _sum_kernel[(count, parts)](
            log_probs,
            anchor,
            given,
            offsets,
            out,
            bound,
            count,
            HAS_MASK=mask is not None,
            SPAN=TOKENS_PER_PROGRAM,
            BLOCK=BLOCK,
            DTYPE=dtype,
        )
    return out.sum(0, dtype=torch.float64).to(log_probs.dtype)


def expand(
    values: Tensor, mask: Tensor | None, offsets: Tensor, longest: int, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    """Give every unmasked token its sequence's value, the others 0: [num_sequences] → [tokens] of `dtype`."""
    out = values.new_empty(num_tokens, dtype=dtype)
    if num_tokens:
        grid = (len(offsets) - 1, triton.cdiv(longest, TOKENS_PER_PROGRAM))
        given = values if mask is None else mask
        _expand_kernel[grid](
            values, given, offsets, out, HAS_MASK=mask is not None, SPAN=TOKENS_PER_PROGRAM, BLOCK=BLOCK
        )
    return out
