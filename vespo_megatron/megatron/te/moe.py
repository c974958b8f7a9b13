"""MoE layer of Transformer Engine's spec."""

from __future__ import annotations

from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from vespo_megatron.megatron.moe_layer import PolicyMoELayer


class TEMoELayer(PolicyMoELayer):
    """`PolicyMoELayer` with megatron-core's experts of Transformer Engine: grouped, or one by one."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        spec = get_moe_module_spec(
            use_te=True, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
        )
        super().__init__(config, spec.submodules, layer_number, pg_collection)
