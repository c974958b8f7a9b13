"""A micro-batch as one rank sees it: every tensor the forward and the loss need, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.layout import SequenceLayout, shape_bucket
from vespo_megatron.megatron.logit_mask import LogitMask
from vespo_megatron.megatron.logprobs import LogProbRequest
from vespo_megatron.megatron.native.attention import NativePackedSeqParams, packed_seq_params
from vespo_megatron.megatron.parallel import RankInfo
from vespo_megatron.routing_replay.router_scores import RouterScores
from vespo_megatron.routing_replay.table import RouteTable


@dataclass
class MicroBatch:
    """Shapes: B sequences, T tokens and R response-token predictions on this context parallel rank."""

    batch: Batch
    layout: SequenceLayout
    input_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T]"""
    packed_seq_params: NativePackedSeqParams
    request: LogProbRequest
    cu_seqlens: torch.Tensor
    """int64 [B + 1], offsets of each sequence's predictions in R; on the host."""
    response_positions: torch.Tensor
    """int64 [R], index of each predicted token in its response."""
    behavior_log_probs: torch.Tensor
    """float32 [R], log μ."""
    mask: torch.Tensor
    """bool [R]"""
    advantages: torch.Tensor
    """float32 [B], or [R] where turns have advantages of their own (`advantage_level`)."""
    is_real: torch.Tensor
    """bool [T / TP], the rows of this rank's routers: False for padding."""
    old_log_probs: torch.Tensor | None = None
    """float32 [R], log π_old by the training engine, once a log-prob pass has run."""
    ref_log_probs: torch.Tensor | None = None
    """float32 [R], log π_ref."""
    engine_routes: RouteTable | None = None
    """What the rollout engine chose, for this rank's rows and layers."""
    trainer_routes: RouteTable | None = None
    """What the training engine chose at θ_old, once a pass has recorded it."""
    router_scores: RouterScores | None = None
    """Where π_old's pass sent the tokens, and the log-probs its routers gave that; this rank's rows and layers."""
    router_shift: torch.Tensor | None = None
    """float32 [R], γ of the routers since then, once a forward of π_θ has measured it."""

    @property
    def advantage_level(self) -> str:
        """token where turns have advantages of their own, else sequence."""
        own = any(sample.turn_advantages is not None for sample in self.batch.samples)
        return "token" if own else "sequence"


def layouts(batches: Sequence[Batch], rank_info: RankInfo, padding_id: int = 0) -> list[SequenceLayout]:
    """The layouts of one pass's micro-batches at a rank (any rank: slicing for others is done with this too).

    With pipeline parallelism all are padded to the longest one: stages then exchange tensors of one known size.
    (megatron-core's exchange of shapes mixes up its messages when previous and next stage are the same rank, as they
    are with two stages and virtual pipelining: p2p_communication.py:183.) On a GPU, whose allocator keeps blocks by
    size, they are padded to a `shape_bucket`.
    """
    result = [
        SequenceLayout.of_samples(
            batch.samples,
            context_parallel_size=rank_info.context_size,
            context_parallel_rank=rank_info.context_rank,
            tensor_parallel_size=rank_info.tensor_size,
            tensor_parallel_rank=rank_info.tensor_rank,
            padding_id=padding_id,
        )
        for batch in batches
    ]
    if rank_info.pipeline_size > 1:
        longest = max(layout.num_global_tokens for layout in result)
        result = [replace(layout, pad_to=longest) for layout in result]
    if rank_info.device.type == "cuda":
        result = [replace(layout, pad_to=shape_bucket(layout.num_global_tokens)) for layout in result]
    return result


def prepare(
    batches: Sequence[Batch],
    rank_info: RankInfo,
    *,
    temperature: float,
    log_prob_bytes: int,
    routes: Sequence[RouteTable | None] | None = None,
) -> list[MicroBatch]:
    """Slice the micro-batches of one pass for this rank and move them to its device; `routes` are sliced already."""
    tables = routes or [None] * len(batches)
    return [
        _slice(batch, layout, rank_info, temperature, log_prob_bytes, table)
        for batch, layout, table in zip(batches, layouts(batches, rank_info), tables, strict=True)
    ]


def _slice(
    batch: Batch,
    layout: SequenceLayout,
    rank_info: RankInfo,
    temperature: float,
    log_prob_bytes: int,
    engine_routes: RouteTable | None,
) -> MicroBatch:
    def to_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(rank_info.device, non_blocking=True)

    token_ids = [sample.token_ids for sample in batch.samples]
    sampling_mask = layout.response_sampling_mask([sample.sampling_mask for sample in batch.samples])
    made = MicroBatch(
        batch=batch,
        layout=layout,
        input_ids=to_device(layout.token_ids(token_ids))[None],
        position_ids=to_device(layout.position_ids)[None],
        packed_seq_params=packed_seq_params(layout, rank_info.device),
        request=LogProbRequest(
            rows=to_device(layout.prediction_rows),
            targets=to_device(layout.targets(token_ids)),
            temperature=temperature,
            memory_bytes=log_prob_bytes,
            logit_mask=None if sampling_mask is None else LogitMask.of(sampling_mask, rank_info.device),
        ),
        cu_seqlens=torch.from_numpy(layout.response_cu_seqlens),
        response_positions=to_device(layout.response_positions),
        behavior_log_probs=to_device(layout.response_values([sample.behavior_log_probs for sample in batch.samples])),
        mask=to_device(layout.response_values([sample.loss_mask for sample in batch.samples])),
        advantages=to_device(batch.advantages.astype(np.float32)),
        is_real=to_device(layout.is_real[layout.sequence_parallel_slice]),
        engine_routes=engine_routes,
    )
    if made.advantage_level == "token":
        pairs = zip(batch.samples, batch.advantages.tolist(), strict=True)
        made.advantages = to_device(layout.response_values([sample.token_advantages(value) for sample, value in pairs]))
    return made
