"""Core attention for packed sequences and context parallelism over PyTorch's SDPA.

Keys and values are all-gathered over context parallel ranks (backward: reduce-scatter) and put back into packed
order; queries stay where they are. Sequences are then run as padded batches, one per power-of-two length class, so
padding at most doubles the work of a class and no mask of the whole pack is ever made. On a GPU, in 16 bits and without
context parallelism, PyTorch's FlashAttention takes the pack as it is: nothing is padded, gathered or put back.

Source of the zigzag order: `data.layout`. megatron-core's own `DotProductAttention` asserts both features off
(dot_product_attention.py:52,166).
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType

from vespo_megatron.data.layout import SequenceLayout


@dataclass(frozen=True)
class LengthClass:
    """Sequences of similar length, run as one padded batch of B sequences.

    `query_index` [B, Lq] rows of this rank's tokens, `key_index` [B, Lk] rows of the packed buffer (padding repeats
    row 0 of the sequence), `mask` [B, 1, Lq, Lk] True where a query may look, or None when plain causality says it.
    `output_rows` [n] flat positions in [B·Lq] of the real queries, `output_index` [n] the rows they belong to.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    mask: torch.Tensor | None
    output_rows: torch.Tensor
    output_index: torch.Tensor


class Pack:
    """What the native attention needs of a layout, on the device; one for all layers of a micro-batch."""

    def __init__(self, layout: SequenceLayout, device: torch.device) -> None:
        self._layout, self._device = layout, device
        self.longest = int(layout.segment_lengths.max())
        self.offsets = torch.from_numpy(layout.cu_seqlens).to(device)
        """int32 [S + 1], of the packed buffer's segments."""

    @cached_property
    def classes(self) -> tuple[LengthClass, ...]:
        """Every segment is in one of them."""
        return tuple(_length_classes(self._layout, self._device))


@dataclass
class NativePackedSeqParams(PackedSeqParams):
    """megatron-core's packed-sequence parameters, plus what the native layers need of the micro-batch."""

    pack: Pack | None = None
    gather_order: torch.Tensor | None = None
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    """Cosines and sines, float32 [T, head_dim / 2], where attention itself turns queries and keys."""

    def without_offsets(self) -> NativePackedSeqParams:
        """For layers whose rotary embedding is given per token.

        megatron-core's own rotates sequence by sequence where it sees offsets, which it fetches to the host in every
        layer (rope_utils.py:204); without them it multiplies the whole pack at once.
        """
        whole = copy(self)
        whole.cu_seqlens_q = whole.cu_seqlens_kv = whole.cu_seqlens_q_padded = whole.cu_seqlens_kv_padded = None
        return whole


def packed_seq_params(layout: SequenceLayout, device: torch.device) -> NativePackedSeqParams:
    """Everything attention needs to know of a micro-batch; computed once, used by every layer."""
    pack = Pack(layout, device)
    cu_seqlens, longest = pack.offsets, pack.longest
    return NativePackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        pack=pack,
        gather_order=(torch.from_numpy(layout.gather_order).to(device) if layout.context_parallel_size > 1 else None),
    )


def _length_classes(layout: SequenceLayout, device: torch.device) -> list[LengthClass]:
    lengths = layout.segment_lengths
    class_of = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    class_of[lengths <= 16] = 4  # below sixteen tokens padding is cheaper than another call
    share = layout.context_parallel_size
    result = []
    for length_class in np.unique(class_of):
        members = np.flatnonzero(class_of == length_class)
        num_keys, num_queries = int(lengths[members].max()), int(lengths[members].max()) // share
        query_index = np.zeros((len(members), num_queries), dtype=np.int64)
        key_index = np.zeros((len(members), num_keys), dtype=np.int64)
        query_position = np.zeros((len(members), num_queries), dtype=np.int64)
        is_query = np.zeros((len(members), num_queries), dtype=bool)
        for row, segment in enumerate(members):
            start, length = layout.cu_seqlens[segment], lengths[segment]
            local = length // share
            first = start // share
            query_index[row, :local] = np.arange(first, first + local)
            query_position[row, :local] = layout.position_ids[first : first + local]
            is_query[row, :local] = True
            key_index[row] = start
            key_index[row, :length] = np.arange(start, start + length)
        mask = None
        if share > 1:
            # A padded key sits beyond its sequence, hence beyond every real query's position.
            mask = torch.from_numpy(np.arange(num_keys) <= query_position[:, :, None])[:, None].to(device)
        result.append(
            LengthClass(
                query_index=torch.from_numpy(query_index).to(device),
                key_index=torch.from_numpy(key_index).to(device),
                mask=mask,
                output_rows=torch.from_numpy(np.flatnonzero(is_query)).to(device),
                output_index=torch.from_numpy(query_index[is_query]).to(device),
            )
        )
    return result


class _GatherOverContextParallel(torch.autograd.Function):
    """All-gather along tokens; the backward reduce-scatters, since every rank's queries used every key."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        local = gradient.new_empty(gradient.shape[0] // ctx.group.size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(local, gradient.contiguous(), group=ctx.group)
        return local, None


class PackedAttention(torch.nn.Module):
    """Causal softmax attention inside each packed sequence.

    Query [T, heads, head_dim], key and value [T, kv_heads, head_dim] of this context parallel rank →
    [T, heads · head_dim].
    """

    def __init__(
        self,
        *,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **_unused: object,
    ) -> None:
        super().__init__()
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"layer {layer_number}: only causal self-attention is implemented")
        self.softmax_scale = softmax_scale
        self.context_parallel_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_unused: object,
    ) -> torch.Tensor:
        """See the class; masks are those of `packed_seq_params`."""
        if not isinstance(packed_seq_params, NativePackedSeqParams) or packed_seq_params.pack is None:
            raise ValueError(
                "the native attention runs packed sequences; build packed_seq_params from a SequenceLayout"
            )
        if packed_seq_params.rotation is not None:
            from vespo_megatron.megatron.native.triton_rotary import rotate

            query, key = rotate(query, *packed_seq_params.rotation), rotate(key, *packed_seq_params.rotation)
        if self.context_parallel_group.size() == 1 and takes_packs(query):
            return flash_attention(query, key, value, packed_seq_params.pack, self.softmax_scale).flatten(1)
        if self.context_parallel_group.size() > 1:
            both = torch.stack([key, value], dim=1)
            both = _GatherOverContextParallel.apply(both, self.context_parallel_group)
            key, value = both.index_select(0, packed_seq_params.gather_order).unbind(1)
        return padded_attention(query, key, value, packed_seq_params.pack, self.softmax_scale).flatten(1)


def takes_packs(query: torch.Tensor) -> bool:
    """Whether PyTorch's FlashAttention can be called with offsets on such queries."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, scale: float | None
) -> torch.Tensor:
    """Query [T, heads, head_dim], key and value [T, kv_heads, head_dim] → [T, heads, head_dim], of whole sequences."""
    # positional: cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask
    fixed = (pack.offsets, pack.offsets, pack.longest, pack.longest, 0.0, True, False)
    return torch.ops.aten._flash_attention_forward(query, key, value, *fixed, scale=scale)[0]


def padded_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, scale: float | None
) -> torch.Tensor:
    """The same by length classes; queries may be a context parallel rank's."""
    output = query.new_zeros(query.shape)
    for batch in pack.classes:
        attended = _attend(
            query[batch.query_index].transpose(1, 2),
            key[batch.key_index].transpose(1, 2),
            value[batch.key_index].transpose(1, 2),
            batch.mask,
            scale,
        )
        rows = attended.transpose(1, 2).reshape(-1, *query.shape[1:]).index_select(0, batch.output_rows)
        output = output.index_copy(0, batch.output_index, rows)
    return output


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """SDPA of [B, heads, Lq, head_dim] and [B, kv_heads, Lk, head_dim]; causal without a mask.

    On a GPU only FlashAttention takes fewer heads of keys than of queries, in 16 bits and without a mask. For anything
    else PyTorch would hold queries × keys, so the heads are repeated, which the memory-efficient kernel takes.
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1 and query.is_cuda and (mask is not None or query.element_size() > 2):
        key, value = (each.repeat_interleave(shared, dim=1) for each in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
