"""A rank's own gradients, looked at where each bucket of them is about to be added to other ranks'.

That is in the middle of the backward with `overlap_grad_reduce` (param_and_grad_buffer.py:561): afterwards a buffer
holds a part of everyone's. Nothing waits for the device until the answer is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

# isort: split
from megatron.core.distributed import DistributedDataParallel

_NUMBERS_AT_ONE_TIME = 1 << 30
"""Below 2³¹, where a GPU's reductions would count in 64 bits."""


class OwnGradients:
    """Of the chunks of one rank, of the backward since `forget`."""

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._extremes: list[torch.Tensor] = []
        for chunk in chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.start_grad_sync = self._looking(group, group.start_grad_sync)

    def forget(self) -> None:
        """Before a backward."""
        self._extremes.clear()

    def finite(self) -> bool:
        """Whether every one was."""
        return _all_finite(self._extremes)

    def _looking(self, group: Any, start: Callable[..., None]) -> Callable[..., None]:
        def look_and_start(*args: Any, **kwargs: Any) -> None:
            if group.grad_reduce_handle is None:
                self._extremes += _extremes_of(bucket.grad_data for bucket in group.buckets)
            start(*args, **kwargs)

        return look_and_start


def gradients_finite(chunks: Sequence[DistributedDataParallel]) -> bool:
    """Whether every gradient is, as the buffers hold them now."""
    buffers = (buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))
    return _all_finite(_extremes_of(buffer.grad_data for buffer in buffers))


def _extremes_of(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The smallest and the largest number of each; they carry NaN and infinities on, and need no copy."""
    parts = [part for tensor in tensors for part in tensor.split(_NUMBERS_AT_ONE_TIME)]
    return [extreme.float() for part in parts for extreme in torch.aminmax(part)]


def _all_finite(numbers: Sequence[torch.Tensor]) -> bool:
    return bool(torch.isfinite(torch.stack(list(numbers))).all()) if numbers else True
