"""MoE layer of the native spec."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec

from vespo_megatron.megatron.moe_layer import PolicyMoELayer
from vespo_megatron.megatron.native.dispatch import SortedDispatcher
from vespo_megatron.megatron.native.experts import GroupedExperts


class NativeMoELayer(PolicyMoELayer):
    """`PolicyMoELayer` with experts of plain PyTorch: grouped, or megatron-core's own one by one."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        gated = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        experts = ModuleSpec(module=GroupedExperts)
        if not config.moe_grouped_gemm:
            experts = ModuleSpec(module=SequentialMLP, submodules=gated)
        shared = ModuleSpec(module=SharedExpertMLP, submodules=gated)
        super().__init__(config, MoESubmodules(experts=experts, shared_experts=shared), layer_number, pg_collection)
        if config.moe_token_dispatcher_type == "alltoall" and torch.cuda.is_available():
            self.token_dispatcher = SortedDispatcher(
                self.num_local_experts,
                self.local_expert_indices,
                config=self.config,
                pg_collection=pg_collection or get_default_pg_collection(),
            )
