"""RMSNorm for sequence parallelism, which megatron-core's for PyTorch refuses (torch_norm.py:32), and over heads."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from vespo_megatron.megatron.parameter_marks import marks


class RMSNorm(torch.nn.RMSNorm):
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension, with megatron-core's constructor.

    The weight's `sequence_parallel` mark makes megatron-core sum its gradient over tensor parallel ranks, each of
    which sees a different shard of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        marks(self.weight).sequence_parallel = config.sequence_parallel


class WidthRMSNorm(torch.nn.Module):
    """RMSNorm of queries or keys over all heads at once, those of other tensor parallel ranks too (OLMoE).

    [tokens, 1, heads here, head_dim] → the same. The weight, [heads here · head_dim], is a shard of the checkpoint's.

    Args:
        hidden_size: channels of a head, as megatron-core gives it.
        heads: what `config` calls their number in the whole model.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: str) -> None:
        super().__init__()
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.eps, self.width = eps, getattr(config, heads) * hidden_size
        here = self.width // self.group.size()
        weight = torch.ones(here, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(weight)
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """See the class; computed in float32 at least, and rounded before it is multiplied with the weight."""
        wide = heads if heads.dtype is torch.float64 else heads.float()
        squares = wide.square().sum(dim=(-2, -1), keepdim=True)
        # Each rank's output depends on every rank's squares: a sum forward, and a sum of their gradients backward.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normed = (wide * torch.rsqrt(squares / self.width + self.eps)).to(heads.dtype)
        return normed * self.weight.view(heads.shape[-2:])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """For checkpoints of any layout."""
        del metadata
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


def norm_over_the_width(attention: SelfAttentionSubmodules) -> None:
    """Give the attention such norms, in place of norms over each head."""
    attention.q_layernorm = ModuleSpec(module=WidthRMSNorm, params={"heads": "num_attention_heads"})
    attention.k_layernorm = ModuleSpec(module=WidthRMSNorm, params={"heads": "num_query_groups"})
