"""Search for what an objective needs to know of a whole mini-batch before its first micro-batch.

A search says what each micro-batch contributes and what follows from all of it. Contributions are added
(`gathers = False`), or gathered token by token (`gathers = True`, a token-sized collective); either way the result does
not depend on how the mini-batch is cut into micro-batches, data or context parallel shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vespo_megatron.losses.ratios import Ratios


class Search(Protocol):
    """See the module; a dataclass whose fields are hyperparameters of the objective."""

    gathers: ClassVar[bool]
    finds: ClassVar[tuple[str, ...]]
    """The hyperparameters that `found` gives: where one of them is given already, nothing is searched for."""

    def contributions(self, ratios: Ratios) -> Tensor:
        """Of one micro-batch here: [k] to be added, or [k, tokens] to be gathered, masked and bad ones left out."""
        ...

    def found(self, contributions: Tensor) -> dict[str, Any]:
        """Hyperparameters of the objective, from everything it is to hold for."""
        ...


S = TypeVar("S", bound=Search)


def to_find(search: type[S], given: Mapping[str, Any]) -> S | None:
    """The search that these hyperparameters ask for, others at their defaults; None where they hold what it finds."""
    if any(given.get(name) is not None for name in search.finds):
        return None
    return search(**{name: given[name] for name in _names(search) if name in given})


def _names(search: Any) -> list[str]:
    return [field.name for field in fields(search)]


def found_in(search: Search, parts: Sequence[Ratios], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """What is found in these micro-batches on every rank of `group`; a collective of it. None: of this rank alone."""
    contributions = [search.contributions(part) for part in parts]
    if search.gathers:
        return search.found(gathered(torch.cat(contributions, 1), group))
    total = torch.stack(contributions).sum(0)
    if group is not None:
        dist.all_reduce(total, group=group)
    return search.found(total)


def on_call(search: Search, ratios: Ratios) -> dict[str, Any]:
    """What is found in the tokens of one call, over context parallelism."""
    return found_in(search, [ratios], ratios.sequences.group)


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
