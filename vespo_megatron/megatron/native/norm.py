"""RMSNorm for sequence parallelism, which megatron-core's own for PyTorch refuses (torch_norm.py:32)."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from vespo_megatron.megatron.parameter_marks import marks


class RMSNorm(torch.nn.RMSNorm):
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension, with megatron-core's constructor.

    The weight's `sequence_parallel` mark makes megatron-core sum its gradient over tensor parallel ranks, each of
    which sees a different shard of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        marks(self.weight).sequence_parallel = config.sequence_parallel
