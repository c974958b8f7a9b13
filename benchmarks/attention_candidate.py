"""A candidate for the native attention on a GPU: FlashAttention for most sequences of a pack, cuDNN for long ones.

Nothing of the package uses it: its answers and its times have not been seen on a card yet. `bench_attention.py` puts it
beside what is used, and holds both to the same errors.

PyTorch's FlashAttention takes a pack with offsets. cuDNN's kernels are half as fast again, but take one shape at a time
and are planned anew for each: so a long sequence goes alone, padded to one of few lengths. A padded key is beyond every
real query, and a padded query has no gradient, so that the padding takes no part. Which kernel a sequence gets hangs
on its own length, never on what it is packed with.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vespo_megatron.megatron.native.attention import flash_attention

LONG = 4096
"""Tokens from which a sequence goes alone."""
STEP = 512
"""What its length is rounded up to a multiple of: thirty shapes up to 20,000 tokens."""


@dataclass(frozen=True)
class Run:
    """Neighbouring short segments, or one long one (`offsets` None), as `flash_attention` wants them."""

    tokens: int
    longest: int
    offsets: torch.Tensor | None


def runs_of(lengths: list[int], offsets: torch.Tensor) -> list[Run]:
    """A pack's tokens in order, cut where the kernel changes: from `offsets` int32 [S + 1] on the device."""
    starts = [0, *itertools.accumulate(lengths)]
    runs, first = [], 0

    def close(stop: int) -> None:
        if stop > first:
            here = offsets[first : stop + 1] - starts[first]
            runs.append(Run(starts[stop] - starts[first], max(lengths[first:stop]), here))

    for number in [number for number, length in enumerate(lengths) if length >= LONG]:
        close(number)
        runs.append(Run(lengths[number], lengths[number], None))
        first = number + 1
    close(len(lengths))
    return runs


def pack_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: list[Run]) -> torch.Tensor:
    """Query [T, heads, head_dim], key and value [T, kv_heads, head_dim] → [T, heads, head_dim], of whole sequences."""
    sizes = [run.tokens for run in runs]
    pieces = zip(*(each.split(sizes) for each in (query, key, value)), runs, strict=True)
    return torch.cat(
        [alone(q, k, v) if run.offsets is None else flash_attention(q, k, v, run, None) for q, k, v, run in pieces]
    )


def alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One sequence, [L, …]."""
    length = len(query)
    padding = (0, 0, 0, 0, 0, -length % STEP)
    q, k, v = (F.pad(each, padding).transpose(0, 1)[None] for each in (query, key, value))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return attended[0].transpose(0, 1)[:length]
