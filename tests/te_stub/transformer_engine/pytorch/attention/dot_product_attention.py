"""Stand-in for pytorch/attention/dot_product_attention: packed causal attention, what it refuses, what it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..distributed import gather_tokens

calls: list[dict[str, Any]] = []
"""What every forward was given, for tests."""


def positions(cu_seqlens: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """[T, 2]: segment and position of each token of a context parallel rank: pieces `rank` and 2·size − 1 − `rank`."""
    rows = []
    for segment, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        assert (end - start) % (2 * size) == 0 or size == 1, "a sequence is no multiple of twice the ranks"
        whole = torch.arange(end - start)
        pieces = whole.chunk(2 * size) if size > 1 else [whole]
        mine = torch.cat([pieces[rank], pieces[2 * size - 1 - rank]]) if size > 1 and len(whole) else whole
        rows.append(torch.stack([torch.full_like(mine, segment), mine], dim=1))
    return torch.cat(rows)


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: dist.ProcessGroup | None = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: dist.ProcessGroup | None = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert attention_type == "self" and attention_dropout == 0.0 and attn_mask_type == "causal"
        assert cp_group is None or (cp_stream is not None and len(cp_global_ranks) == cp_group.size())
        assert cp_comm_type == "p2p"
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type
        self.softmax_scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale

        def forget_extra_state(_module: torch.nn.Module, incompatible: Any) -> None:
            for key in list(incompatible.missing_keys):
                if "core_attention._extra_state" in key:
                    incompatible.missing_keys.remove(key)

        self.register_load_state_dict_post_hook(forget_extra_state)

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or state.numel() == 0

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        pad_between_seqs: bool | None = None,
    ) -> torch.Tensor:
        """[T, heads, channels] → [T, heads · channels]; offsets are of the whole pack, tokens of this rank."""
        size = 1 if self.cp_group is None else self.cp_group.size()
        calls.append(
            {
                "cu_seqlens": cu_seqlens_q,
                "max_seqlen": max_seqlen_q,
                "mask": attn_mask_type,
                "compares_offsets": pad_between_seqs is None and cu_seqlens_q_padded is not None,
            }
        )
        assert qkv_format == "thd" and "padding" in attn_mask_type and attention_mask is None
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_kv, int)
        if size > 1:  # context_parallel.py:3800
            assert cu_seqlens_q_padded is not None and cu_seqlens_kv_padded is not None
        assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
        here = positions(cu_seqlens_q, size, self.cp_group.rank() if size > 1 else 0)
        everywhere = torch.cat([positions(cu_seqlens_kv, size, rank) for rank in range(size)])
        assert len(here) == len(query_layer)
        if size > 1:
            key_layer = gather_tokens(key_layer, self.cp_group)
            value_layer = gather_tokens(value_layer, self.cp_group)
        share = query_layer.shape[1] // key_layer.shape[1]
        key, value = (each.repeat_interleave(share, dim=1) for each in (key_layer, value_layer))
        scores = torch.einsum("qhd,khd->hqk", query_layer, key) * self.softmax_scale
        seen = (here[:, None, 0] == everywhere[None, :, 0]) & (everywhere[None, :, 1] <= here[:, None, 1])
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)
