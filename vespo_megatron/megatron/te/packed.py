"""Packed sequences as Transformer Engine's attention and the rotary embedding before it are to see them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class TEPackedSeqParams(PackedSeqParams):
    """megatron-core's parameters, and those of attention where the two must differ."""

    pad_between_seqs: bool = False
    """Offsets and padded offsets are the same here. Left to find out, Transformer Engine compares them in every layer,
    which waits for the device (dot_product_attention.py:1275 of 2.9); without the padded ones context parallelism
    refuses to run (context_parallel.py:3800)."""
    of_attention: PackedSeqParams | None = None
    """What attention gets instead of the object itself."""

    @classmethod
    def of(cls, params: PackedSeqParams, *, rotates_per_token: bool) -> TEPackedSeqParams:
        """`params`, whose offsets the rotary embedding does not see if every token's angle is given.

        megatron-core's unfused one fetches the offsets to the host twice in every layer (rope_utils.py:204, 211); the
        fused one of Transformer Engine needs them, on the device.
        """
        attention = cls(
            qkv_format=params.qkv_format,
            cu_seqlens_q=params.cu_seqlens_q,
            cu_seqlens_kv=params.cu_seqlens_kv,
            cu_seqlens_q_padded=params.cu_seqlens_q_padded,
            cu_seqlens_kv_padded=params.cu_seqlens_kv_padded,
            max_seqlen_q=params.max_seqlen_q,
            max_seqlen_kv=params.max_seqlen_kv,
        )
        shown = PackedSeqParams() if rotates_per_token else attention
        return cls(
            qkv_format=params.qkv_format,
            cu_seqlens_q=shown.cu_seqlens_q,
            cu_seqlens_kv=shown.cu_seqlens_kv,
            max_seqlen_q=params.max_seqlen_q,
            max_seqlen_kv=params.max_seqlen_kv,
            of_attention=attention,
        )
