"""How megatron-core's parameters are made of Hugging Face's tensors, and the other way. Pure: shapes and slices only.

A megatron-core parameter is one *shard* of one or several HF tensors joined together. A `Rule` knows both ways:
`shard(hf_tensors, index, count)` and `merge(shards)`. Facts (PITFALLS.md): `linear_qkv` is grouped, for each
key-value group its query heads, then its key, then its value; `linear_fc1` is gate above up, inside each shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rule:
    """One parameter, replicated over tensor parallel ranks. `names` are the HF tensors it holds."""

    names: tuple[str, ...]
    is_expert: bool = False
    """Sharded over expert tensor parallel ranks instead of tensor parallel ones."""
    is_sharded = False

    def shard(self, tensors: Sequence[torch.Tensor], index: int, count: int) -> torch.Tensor:
        """HF tensors → shard `index` of `count`."""
        del index, count  # every rank holds all of it
        return tensors[0]

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All shards in order → HF tensors, in the order of `names`."""
        return [shards[0]]


@dataclass(frozen=True)
class Split(Rule):
    """Cut along `dim`: 1 for row-parallel weights (`o_proj`, `down_proj`), 0 for a norm over the whole width."""

    dim: int = 1
    is_sharded = True

    def shard(self, tensors: Sequence[torch.Tensor], index: int, count: int) -> torch.Tensor:
        """See `Rule`."""
        return tensors[0].chunk(count, dim=self.dim)[index]

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Rule`."""
        return [torch.cat(list(shards), dim=self.dim)]


@dataclass(frozen=True)
class Vocabulary(Rule):
    """Rows cut after padding the vocabulary with zeros to a multiple of the shard count."""

    vocab_size: int = 0
    is_sharded = True

    def shard(self, tensors: Sequence[torch.Tensor], index: int, count: int) -> torch.Tensor:
        """See `Rule`."""
        rows = -(-self.vocab_size // count)
        shard = tensors[0][index * rows : (index + 1) * rows]
        padding = shard.new_zeros(rows - shard.shape[0], shard.shape[1])
        return torch.cat([shard, padding]) if len(padding) else shard

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Rule`."""
        return [torch.cat(list(shards))[: self.vocab_size]]


@dataclass(frozen=True)
class GateUp(Rule):
    """`linear_fc1`: gate above up, each cut along its rows."""

    is_sharded = True

    def shard(self, tensors: Sequence[torch.Tensor], index: int, count: int) -> torch.Tensor:
        """See `Rule`."""
        return torch.cat([tensor.chunk(count)[index] for tensor in tensors])

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Rule`."""
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[part] for half in halves]) for part in (0, 1)]


@dataclass(frozen=True)
class GroupedQKV(Rule):
    """`linear_qkv`, weight or bias: groups of (query heads, key, value), cut by groups."""

    num_groups: int = 0
    head_dim: int = 0
    is_sharded = True

    def shard(self, tensors: Sequence[torch.Tensor], index: int, count: int) -> torch.Tensor:
        """See `Rule`."""
        grouped = [tensor.unflatten(0, (self.num_groups, -1)) for tensor in tensors]
        return torch.cat(grouped, dim=1).chunk(count)[index].flatten(0, 1)

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Rule`."""
        grouped = torch.cat(list(shards)).unflatten(0, (self.num_groups, -1))
        query_rows = grouped.shape[1] - 2 * self.head_dim
        parts = grouped.split([query_rows, self.head_dim, self.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class Stacked(Rule):
    """Experts one above the other along a new first dimension, each by its own rule of `parts`."""

    parts: tuple[Rule, ...] = ()
    is_sharded = True

    @staticmethod
    def of(parts: Sequence[Rule]) -> Stacked:
        """The rule of a stack of these."""
        names = tuple(name for part in parts for name in part.names)
        return Stacked(names, is_expert=True, parts=tuple(parts))

    def shard(self, tensors: Sequence[torch.Tensor], index: int, count: int) -> torch.Tensor:
        """See `Rule`."""
        width = len(self.parts[0].names)
        return torch.stack(
            [
                part.shard(tensors[number * width : (number + 1) * width], index, count)
                for number, part in enumerate(self.parts)
            ]
        )

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Rule`."""
        return [
            tensor
            for number, part in enumerate(self.parts)
            for tensor in part.merge([shard[number] for shard in shards])
        ]
