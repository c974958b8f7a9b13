"""`SequenceLayout`: the one owner of every slice of a packed micro-batch.

Tokens, labels, masks, log-probs and routes reach a rank through this class and nothing else. It is pure numpy,
knows no process group, and therefore answers for rank (tp 7, cp 3) of a thousand on one core.

The packed buffer ("global" below) is the micro-batch's sequences one after another, each padded at its end to a
multiple of 2·CP, then a tail of padding that makes every rank's share divisible by TP. Context parallel rank r of C
holds, of each padded sequence cut in 2·C equal chunks, chunk r and chunk 2C−1−r ("zigzag": equal causal work on
every rank). Tensor parallel ranks see the same tokens; with sequence parallelism each keeps one of TP equal
contiguous shards of the rank's tokens.

Invariants, which `tests/data/test_layout.py` asserts:
  1. every real token is held by exactly one context parallel rank; so is every response token's prediction;
  2. all ranks hold the same number of tokens, a multiple of TP;
  3. within one sequence and rank, positions increase;
  4. concatenating the shards of all ranks and undoing the zigzag gives the packed buffer back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from vespo_megatron.data.sample import Sample
from vespo_megatron.data.sampling_mask import SamplingMask


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def shape_bucket(tokens: int) -> int:
    """The next of 32 sizes per power of two: at most 3% more tokens, and few shapes that come again and again."""
    return round_up(tokens, 1 << max(tokens.bit_length() - 6, 0))


def padded_length(length: int, context_parallel_size: int) -> int:
    """Tokens a sequence of `length` occupies in the packed buffer (all context parallel ranks together)."""
    return length if context_parallel_size == 1 else round_up(length, 2 * context_parallel_size)


@dataclass(frozen=True)
class SequenceLayout:
    """Where everything of one micro-batch is, for one (tensor parallel, context parallel) rank.

    Shapes: S segments (the sequences, then the tail if there is one), G tokens of the packed buffer,
    T = G / CP tokens on this rank.
    """

    lengths: tuple[int, ...]
    """Real tokens of each sequence, prompt and response."""
    prompt_lengths: tuple[int, ...]
    """Prompt tokens of each sequence."""
    context_parallel_size: int = 1
    context_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    tensor_parallel_rank: int = 0
    padding_id: int = 0
    pad_to: int = 0
    """Make the packed buffer at least this long: pipeline stages exchange micro-batches of one size."""

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.prompt_lengths):
            raise ValueError(f"{len(self.lengths)} lengths but {len(self.prompt_lengths)} prompt lengths")
        for length, prompt in zip(self.lengths, self.prompt_lengths, strict=True):
            if not 0 < prompt <= length:
                raise ValueError(f"a prompt of {prompt} tokens in a sequence of {length}")

    # ---- the packed buffer -------------------------------------------------------------------------------

    @cached_property
    def segment_lengths(self) -> np.ndarray:
        """int64 [S], padded length of each segment, the tail included."""
        cp = self.context_parallel_size
        padded = [padded_length(length, cp) for length in self.lengths]
        chunk = 1 if cp == 1 else 2
        alignment = cp * chunk * self.tensor_parallel_size
        tail = round_up(max(sum(padded), self.pad_to), alignment) - sum(padded)
        return np.array([*padded, tail] if tail else padded, dtype=np.int64)

    @cached_property
    def cu_seqlens(self) -> np.ndarray:
        """int32 [S + 1], offsets of the segments in the packed buffer."""
        return np.concatenate([[0], np.cumsum(self.segment_lengths)]).astype(np.int32)

    @property
    def num_global_tokens(self) -> int:
        """G"""
        return int(self.cu_seqlens[-1])

    @property
    def num_local_tokens(self) -> int:
        """T"""
        return self.num_global_tokens // self.context_parallel_size

    def positions_of(self, context_parallel_rank: int) -> np.ndarray:
        """int64 [T], the packed-buffer position of each token of that rank, in the rank's order."""
        cp = self.context_parallel_size
        if cp == 1:
            return np.arange(self.num_global_tokens)
        pieces = []
        for start, length in zip(self.cu_seqlens[:-1], self.segment_lengths, strict=True):
            chunk = length // (2 * cp)
            pieces += [
                np.arange(start + index * chunk, start + (index + 1) * chunk)
                for index in (context_parallel_rank, 2 * cp - 1 - context_parallel_rank)
            ]
        return np.concatenate(pieces)

    @cached_property
    def positions(self) -> np.ndarray:
        """int64 [T], this rank's `positions_of`."""
        return self.positions_of(self.context_parallel_rank)

    @cached_property
    def gather_order(self) -> np.ndarray:
        """int64 [G]: `concatenated_shards[gather_order]` is the packed buffer (undoes the zigzag)."""
        order = np.concatenate([self.positions_of(rank) for rank in range(self.context_parallel_size)])
        return np.argsort(order, kind="stable")

    @cached_property
    def segment_ids(self) -> np.ndarray:
        """int64 [G], the segment of each packed-buffer position."""
        return np.repeat(np.arange(len(self.segment_lengths)), self.segment_lengths)

    @cached_property
    def position_ids(self) -> np.ndarray:
        """int64 [T], position of each of this rank's tokens inside its own sequence."""
        return self.positions - self.cu_seqlens[:-1][self.segment_ids[self.positions]]

    @property
    def sequence_parallel_slice(self) -> slice:
        """Which of this rank's T tokens its tensor parallel shard holds."""
        shard = self.num_local_tokens // self.tensor_parallel_size
        return slice(self.tensor_parallel_rank * shard, (self.tensor_parallel_rank + 1) * shard)

    @cached_property
    def is_real(self) -> np.ndarray:
        """bool [T], False for padding."""
        lengths = np.array([*self.lengths, 0])  # the tail, where there is one, has no real token
        return self.position_ids < lengths[self.segment_ids[self.positions]]

    # ---- slices ------------------------------------------------------------------------------------------

    def _scatter(self, rows: Sequence[np.ndarray], fill: int, dtype: np.dtype) -> np.ndarray:
        """Rows per sequence [length_i, ...] → packed buffer [G, ...]."""
        trailing = rows[0].shape[1:] if rows else ()
        packed = np.full((self.num_global_tokens, *trailing), fill, dtype=dtype)
        for start, row in zip(self.cu_seqlens, rows, strict=False):
            packed[start : start + len(row)] = row
        return packed

    def token_ids(self, token_ids: Sequence[np.ndarray]) -> np.ndarray:
        """Token ids of each sequence → int64 [T]."""
        return self._scatter(token_ids, self.padding_id, np.dtype(np.int64))[self.positions]

    @cached_property
    def prediction_positions(self) -> np.ndarray:
        """int64, packed-buffer positions on this rank whose *next* token is a response token, in rank order."""
        predicts = np.zeros(self.num_global_tokens, dtype=bool)
        for start, length, prompt in zip(self.cu_seqlens, self.lengths, self.prompt_lengths, strict=False):
            predicts[start + prompt - 1 : start + length - 1] = True
        return self.positions[predicts[self.positions]]

    @cached_property
    def prediction_rows(self) -> np.ndarray:
        """int64 [R_local], rows of this rank's T tokens that predict a response token."""
        return np.flatnonzero(np.isin(self.positions, self.prediction_positions, assume_unique=True))

    def targets(self, token_ids: Sequence[np.ndarray]) -> np.ndarray:
        """int64 [R_local], the response token each prediction row predicts."""
        return self._scatter(token_ids, self.padding_id, np.dtype(np.int64))[self.prediction_positions + 1]

    @cached_property
    def _response_index(self) -> np.ndarray:
        """int64 [R_local], index of each prediction in the concatenation of all responses."""
        response_lengths = np.array(self.lengths) - np.array(self.prompt_lengths)
        offsets = np.concatenate([[0], np.cumsum(response_lengths)])
        return offsets[self.segment_ids[self.prediction_positions]] + self.response_positions

    @cached_property
    def response_positions(self) -> np.ndarray:
        """int64 [R_local], index of each predicted token inside its own response."""
        segments = self.segment_ids[self.prediction_positions]
        return self.prediction_positions - self.cu_seqlens[segments] - (np.array(self.prompt_lengths)[segments] - 1)

    def response_values(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Per-response-token values [response_i] of each sequence → this rank's [R_local]."""
        return np.concatenate(values)[self._response_index]

    def response_sampling_mask(self, sampling_mask: Sequence[SamplingMask | None]) -> SamplingMask | None:
        """What each of this rank's [R_local] response tokens was drawn from; None where nothing truncated any."""
        if all(each is None for each in sampling_mask):
            return None
        whole = map(SamplingMask.whole, np.array(self.lengths) - np.array(self.prompt_lengths))
        known = [each or full for each, full in zip(sampling_mask, whole, strict=True)]
        return SamplingMask.concatenate(known).select(self._response_index)

    @cached_property
    def response_cu_seqlens(self) -> np.ndarray:
        """int64 [sequences + 1], offsets of each sequence's predictions among this rank's R_local."""
        counts = np.bincount(self.segment_ids[self.prediction_positions], minlength=len(self.lengths))
        return np.concatenate([[0], np.cumsum(counts[: len(self.lengths)])])

    def merge_response_values(self, shards: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The inverse of `response_values`: [R_local, …] of every context parallel rank → one array per sequence."""
        response_lengths = np.array(self.lengths) - np.array(self.prompt_lengths)
        merged = np.empty((int(response_lengths.sum()), *shards[0].shape[1:]), dtype=shards[0].dtype)
        for rank, shard in enumerate(shards):
            merged[self.at(context_parallel_rank=rank)._response_index] = shard
        return np.split(merged, np.cumsum(response_lengths)[:-1])

    def routes(
        self, routes: Sequence[np.ndarray], stale: Sequence[np.ndarray], topk: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Routes of each sequence → this tensor parallel shard's rows, as its routers see them.

        Args:
            routes: per sequence [rows_i ≤ length_i, layers, topk].
            stale: per sequence bool [rows_i], routes not to be used.
            topk: experts per token.

        Returns:
            routes [T / TP, layers, topk] and live bool [T / TP]: rows for the live router, stale ones and tokens nobody
            recorded (a sequence's last). Padding is not live: it gets experts 0 … topk−1, valid and distinct.
        """
        packed = self._scatter(routes, 0, routes[0].dtype)
        live = np.zeros(self.num_global_tokens, dtype=bool)
        recorded = np.zeros(self.num_global_tokens, dtype=bool)
        for start, length, flags in zip(self.cu_seqlens, self.lengths, stale, strict=False):
            recorded[start : start + len(flags)] = ~flags
            live[start : start + length] = ~recorded[start : start + length]
        packed[~recorded] = np.arange(topk, dtype=packed.dtype)
        local = self.positions[self.sequence_parallel_slice]
        return packed[local], live[local]

    def router_rows(self, values: Sequence[np.ndarray], fill: int) -> np.ndarray:
        """Values of each sequence's first tokens → int64 [T / TP], in the order of `routes`; `fill` elsewhere."""
        packed = self._scatter(values, fill, np.dtype(np.int64))
        return packed[self.positions[self.sequence_parallel_slice]]

    def at(
        self, *, context_parallel_rank: int | None = None, tensor_parallel_rank: int | None = None
    ) -> SequenceLayout:
        """The same micro-batch on another rank."""
        return replace(
            self,
            context_parallel_rank=self.context_parallel_rank
            if context_parallel_rank is None
            else context_parallel_rank,
            tensor_parallel_rank=self.tensor_parallel_rank if tensor_parallel_rank is None else tensor_parallel_rank,
        )

    @classmethod
    def of_samples(cls, samples: Sequence[Sample], **parallel: int) -> SequenceLayout:
        """The layout of a micro-batch of samples; `parallel` are the sizes and ranks."""
        return cls(
            lengths=tuple(sample.num_tokens for sample in samples),
            prompt_lengths=tuple(len(sample.prompt_ids) for sample in samples),
            **parallel,
        )
