"""Numbers that ranks know of the response tokens of their micro-batches, put together sample by sample on rank 0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vespo_megatron.data.layout import SequenceLayout
from vespo_megatron.megatron.micro_batch import MicroBatch
from vespo_megatron.trainer.scatter import Scatter


@dataclass(frozen=True)
class ResponseShard:
    """What one context parallel rank knows of one micro-batch."""

    place: tuple[int, ...]
    """The same on context parallel ranks of a micro-batch, and nowhere else."""
    layout: SequenceLayout
    names: list[str]
    """Of the samples."""
    values: list[np.ndarray]
    """[R, …] each."""

    @classmethod
    def of(cls, micro_batch: MicroBatch, place: tuple[int, ...], values: list[np.ndarray]) -> ResponseShard:
        """Of this rank's part of `micro_batch`."""
        return cls(place, micro_batch.layout, [sample.sample_id for sample in micro_batch.batch.samples], values)


def on_rank_zero(
    scatter: Scatter, shards: Sequence[ResponseShard]
) -> Iterator[tuple[tuple[int, ...], str, list[np.ndarray]]]:
    """Place, sample and its values [T, …], of every rank's shards; nothing but on rank 0. A collective."""
    by_place: dict[tuple[int, ...], list[ResponseShard]] = {}
    for shard in (shard for of_rank in scatter.to_rank_zero(list(shards)) for shard in of_rank):
        by_place.setdefault(shard.place, []).append(shard)
    return (
        (place, name, values)
        for place, parts in by_place.items()
        for name, values in _merged(sorted(parts, key=lambda shard: shard.layout.context_parallel_rank))
    )


def _merged(parts: Sequence[ResponseShard]) -> Iterator[tuple[str, list[np.ndarray]]]:
    merged = [
        parts[0].layout.merge_response_values([shard.values[index] for shard in parts])
        for index in range(len(parts[0].values))
    ]
    for number, name in enumerate(parts[0].names):
        yield name, [of_all[number] for of_all in merged]
