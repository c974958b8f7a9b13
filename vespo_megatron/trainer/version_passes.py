"""Which micro-batches are scored under which weight version, the same on every rank: collectives must meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vespo_megatron.data.batch import Batch


@dataclass(frozen=True)
class VersionPass:
    """A pass over the micro-batches that hold tokens of one version, on any data parallel rank."""

    version: int
    micro_batches: tuple[tuple[int, ...], ...]
    """[mini-batch] → indices of micro-batches in it."""
    sample_id: str
    """One that has tokens of it."""


def plan_version_passes(
    shards: Sequence[Sequence[Sequence[Batch]]], *, multiple_of: int = 1
) -> tuple[VersionPass, ...]:
    """A pass for each version that a response token was drawn by, the newest first. Pure.

    Args:
        shards: [data parallel rank][mini-batch][micro-batch], as many of each on every rank.
        multiple_of: take so many micro-batches or a multiple, which a virtual pipeline needs; there are as many.
    """
    found: dict[int, list[set[int]]] = {}
    named: dict[int, str] = {}
    for mini_batches in shards:
        for mini_batch, micro_batches in enumerate(mini_batches):
            for index, batch in enumerate(micro_batches):
                for sample in batch.samples:
                    for version in np.unique(sample.weight_versions).tolist():
                        named.setdefault(version, sample.sample_id)
                        found.setdefault(version, [set() for _ in mini_batches])[mini_batch].add(index)
    sizes = [len(micro_batches) for micro_batches in shards[0]]
    return tuple(
        VersionPass(
            version,
            tuple(_filled(chosen, size, multiple_of) for chosen, size in zip(found[version], sizes, strict=True)),
            named[version],
        )
        for version in sorted(found, reverse=True)
    )


def _filled(chosen: set[int], size: int, multiple: int) -> tuple[int, ...]:
    """`chosen`, with others of the `size` until they are a multiple."""
    others = (index for index in range(size) if index not in chosen)
    wanted = -(-len(chosen) // multiple) * multiple
    return tuple(sorted([*chosen, *(index for index, _ in zip(others, range(wanted - len(chosen)), strict=False))]))
