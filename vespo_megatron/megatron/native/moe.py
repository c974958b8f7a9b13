"""MoE layer of the native spec: megatron-core's own, which also trains with TP without sequence parallelism.

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
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec

from vespo_megatron.megatron.native.dispatch import LocalDispatcher
from vespo_megatron.megatron.native.experts import GroupedExperts
from vespo_megatron.megatron.parameter_marks import marks

_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class TokenShardedRouter(TopKRouter):
    """A router that sees one shard of the tokens; its weight's gradient is summed over tensor parallel ranks."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Router logits of `input` [tokens, hidden_size]: [tokens, experts]."""
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group)
        dtype = _ROUTER_DTYPES.get(self.config.moe_router_dtype, input.dtype)
        return router_gating_linear(input, weight, self.bias, dtype)


class NativeMoELayer(MoELayer):
    """`MoELayer` for any combination of tensor and sequence parallelism. Input and output as upstream's."""

    token_dispatcher: MoETokenDispatcher

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        self.shards_tokens = config.tensor_model_parallel_size > 1 and not config.sequence_parallel
        router = TopKRouter
        if self.shards_tokens:
            config = copy(config)
            config.sequence_parallel = True
            router = TokenShardedRouter
        experts = ModuleSpec(module=GroupedExperts)
        if not config.moe_grouped_gemm:
            experts = ModuleSpec(
                module=SequentialMLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            )
        super().__init__(
            config,
            submodules=MoESubmodules(experts=experts, router=router),
            layer_number=layer_number,
            pg_collection=pg_collection,
        )
        if LocalDispatcher.can_replace(self.token_dispatcher) and next(self.experts.parameters()).is_cuda:
            self.token_dispatcher = LocalDispatcher.of(self.token_dispatcher)
        for parameter in self.experts.parameters():
            # "Reduce over expert data parallel ranks": upstream says so for EP > 1 only (layers.py:863), and with
            # TP > 1, EP = ETP = 1 never sums what the tensor parallel ranks' different tokens contribute.
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
