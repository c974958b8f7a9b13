"""Causal attention over a pack on a GPU, without padding it: FlashAttention for most, cuDNN for long sequences.

PyTorch's FlashAttention takes a pack with offsets. cuDNN's kernels are half as fast again, but take one shape at a time
and are planned anew for each: so a long sequence goes alone, padded to one of few lengths. A padded key is beyond every
real query, and a padded query has no gradient, so that the padding takes no part. Which kernel a sequence gets hangs
on its own length, never on what it is packed with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LONG = 4096
"""Tokens from which a sequence goes alone."""
STEP = 512
"""What its length is rounded up to a multiple of: thirty shapes up to 20,000 tokens."""


@dataclass(frozen=True)
class Run:
    """Neighbouring short segments, or one long one (`offsets` None). `longest` and `tokens` in tokens."""

    tokens: int
    longest: int
    offsets: torch.Tensor | None


@dataclass(frozen=True)
class PackRuns:
    """A pack's tokens in order, cut where the kernel changes."""

    runs: tuple[Run, ...]
    whole: Run
    """All of it for FlashAttention."""

    @staticmethod
    def of(lengths: np.ndarray, offsets: torch.Tensor) -> PackRuns:
        """Of segments' lengths int [S] on the host and offsets int32 [S + 1] on the device."""
        starts = [0, *np.cumsum(lengths).tolist()]
        runs, first = [], 0

        def close(stop: int) -> None:
            if stop > first:
                here = offsets[first : stop + 1] - starts[first]
                runs.append(Run(starts[stop] - starts[first], int(lengths[first:stop].max()), here))

        for number in np.flatnonzero(lengths >= LONG).tolist():
            close(number)
            runs.append(Run(int(lengths[number]), int(lengths[number]), None))
            first = number + 1
        close(len(lengths))
        return PackRuns(tuple(runs), Run(starts[-1], int(lengths.max()), offsets))


def takes_packs(query: torch.Tensor) -> bool:
    """Whether PyTorch's FlashAttention can be called with offsets on such queries."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256


def pack_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: PackRuns, scale: float | None
) -> torch.Tensor:
    """Query [T, heads, head_dim], key and value [T, kv_heads, head_dim] → [T, heads, head_dim], of whole sequences."""
    if all(run.offsets is not None for run in pack.runs) or not _cudnn_takes(query):
        return flash_attention(query, key, value, pack.whole, scale)
    sizes = [run.tokens for run in pack.runs]
    pieces = zip(*(each.split(sizes) for each in (query, key, value)), pack.runs, strict=True)
    return torch.cat(
        [
            _alone(q, k, v, scale) if run.offsets is None else flash_attention(q, k, v, run, scale)
            for q, k, v, run in pieces
        ]
    )


def _cudnn_takes(query: torch.Tensor) -> bool:
    """Its backward adds up in no fixed order, and has no kernel for heads wider than 128 on every card."""
    return query.shape[-1] <= 128 and not torch.are_deterministic_algorithms_enabled()


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, run: Run, scale: float | None
) -> torch.Tensor:
    """One call for all of a run."""
    # positional: cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask
    fixed = (run.offsets, run.offsets, run.longest, run.longest, 0.0, True, False)
    return torch.ops.aten._flash_attention_forward(query, key, value, *fixed, scale=scale)[0]


def _alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """One sequence, [L, …]."""
    length = len(query)
    padding = (0, 0, 0, 0, 0, -length % STEP)
    q, k, v = (F.pad(each, padding).transpose(0, 1)[None] for each in (query, key, value))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return attended[0].transpose(0, 1)[:length]
