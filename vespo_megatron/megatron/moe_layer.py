"""MoE layer of the policy, whatever its experts are made of: megatron-core's, right for TP > 1 in every combination.

megatron-core refuses to train MoE with TP > 1 and no sequence parallelism (moe_layer.py:398): every tensor parallel
rank would dispatch the same tokens, and experts would count them TP times. Here the tokens are sharded for the length
of the MoE layer, each TP rank dispatching its share, and gathered again after it.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.moe.router import TopKRouter

from vespo_megatron.megatron.parameter_marks import marks

_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class PolicyRouter(TopKRouter):
    """megatron-core's, without its count of tokens, which it would compile on a GPU (router.py:532)."""

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Nothing: who moves correction biases (`correction_bias`) has the counts of `RouteReplay`."""


class TokenShardedRouter(PolicyRouter):
    """A router that sees one shard of the tokens; its weight's gradient is summed over tensor parallel ranks."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Router logits of `input` [tokens, hidden_size]: [tokens, experts]."""
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group)
        dtype = _ROUTER_DTYPES.get(self.config.moe_router_dtype, input.dtype)
        return router_gating_linear(input, weight, self.bias, dtype)


def keep_biases_in_float32(model: torch.nn.Module) -> None:
    """Give routers the float32 correction biases that a conversion of the whole model to 16 bits has taken."""
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module._maintain_float32_expert_bias()  # upstream does so in the first forward: after weights are loaded


class PolicyMoELayer(MoELayer):
    """`MoELayer` for any combination of tensor and sequence parallelism. Input and output as upstream's.

    Args:
        submodules: what makes the experts, and those that see every token; the router is this module's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        self.shards_tokens = config.tensor_model_parallel_size > 1 and not config.sequence_parallel
        router: type[TopKRouter] = PolicyRouter
        if self.shards_tokens:
            config = copy(config)
            config.sequence_parallel = True
            router = TokenShardedRouter
        super().__init__(
            config,
            submodules=MoESubmodules(
                experts=submodules.experts, shared_experts=submodules.shared_experts, router=router
            ),
            layer_number=layer_number,
            pg_collection=pg_collection,
        )
        for parameter in self.experts.parameters():
            # "Reduce over expert data parallel ranks": upstream says so for EP > 1 only (layers.py:863; of Transformer
            # Engine's wrappers transformer_engine.py:644 and 1551), and with TP > 1, EP = ETP = 1 never sums what the
            # tensor parallel ranks' different tokens contribute. DDP, which comes later, goes by this mark.
            marks(parameter).allreduce = False

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` [tokens, 1, hidden_size] → the same shape, and upstream's bias."""
        if not self.shards_tokens:
            return super().forward(hidden_states, *args, **kwargs)
        shard = scatter_to_sequence_parallel_region(hidden_states, group=self.tp_group)
        output, bias = super().forward(shard, *args, **kwargs)
        return gather_from_sequence_parallel_region(
            output, tensor_parallel_output_grad=False, group=self.tp_group
        ), bias
