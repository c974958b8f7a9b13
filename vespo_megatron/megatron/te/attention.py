"""megatron-core's attention by Transformer Engine, given the offsets that the rotary embedding did not see."""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention

from vespo_megatron.megatron.te.packed import TEPackedSeqParams


class TEPackedAttention(TEDotProductAttention):
    """Constructor, input and output as upstream's; packed sequences only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept_packed_seq_params.add("pad_between_seqs")  # which of the parameters' fields upstream passes on

    def forward(self, *args: Any, packed_seq_params: TEPackedSeqParams, **kwargs: Any) -> Any:
        """As upstream's, with the offsets that are meant for attention."""
        return super().forward(*args, packed_seq_params=packed_seq_params.of_attention, **kwargs)
