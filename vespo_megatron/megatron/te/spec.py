"""megatron-core's layer spec of Transformer Engine, with the policy's own attention and MoE layer in it."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.megatron.native.norm import norm_over_the_width
from vespo_megatron.megatron.te.attention import TEPackedAttention
from vespo_megatron.megatron.te.moe import TEMoELayer


def te_block_spec(config: TransformerConfig, shape: ModelShape, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers that this pipeline rank and model chunk builds."""
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    for layer in (spec.submodules for spec in block.layer_specs):  # one object for all layers of a kind
        layer.self_attention.submodules.core_attention = TEPackedAttention
        if shape.qk_norm == "width":
            norm_over_the_width(layer.self_attention.submodules)
        if getattr(layer.mlp, "module", None) is MoELayer:
            layer.mlp = TEMoELayer
    return block
