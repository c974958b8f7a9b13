"""Search for what an objective needs to know of a whole mini-batch before its first micro-batch.

A search says what each micro-batch contributes and what follows from all of it. Contributions are added
(`gathers = False`), or gathered token by token (`gathers = True`, a token-sized collective); either way the result does
not depend on how the mini-batch is cut into micro-batches, data or context parallel shares.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from vespo_megatron.losses.ratios import Ratios


class Search(Protocol):
    """See the module."""

    gathers: bool

    def contributions(self, ratios: Ratios) -> Tensor:
        """Of one micro-batch here: [k] to be added, or [k, tokens] to be gathered, masked and bad ones left out."""
        ...

    def found(self, contributions: Tensor) -> dict[str, Any]:
        """Hyperparameters of the objective, from everything it is to hold for."""
        ...


def gathered(columns: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[k, all tokens] from every rank's `columns [k, tokens]`, in the order of ranks; a collective of `group`."""
    if group is None:
        return columns
    size = dist.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.int64, device=columns.device) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([columns.shape[1]], device=columns.device), group=group)
    longest = max(int(count) for count in counts)
    padded = columns.new_zeros(columns.shape[0], longest)
    padded[:, : columns.shape[1]] = columns
    parts = [torch.zeros_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:, : int(count)] for part, count in zip(parts, counts, strict=True)], 1)


def counted_tokens(ratios: Ratios, columns: list[Tensor]) -> Tensor:
    """[k, counted tokens]: columns [tokens] without what is masked or of a bad sequence."""
    ones = ratios.counted(torch.ones_like(ratios.log_probs))
    return torch.stack([column.to(torch.float64) for column in columns])[:, ones > 0]
