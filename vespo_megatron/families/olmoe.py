"""OLMoE (arXiv 2409.02060): experts in every layer, a norm over the whole width of queries and of keys."""

from __future__ import annotations

from vespo_megatron.families.config_keys import ConfigKeys
from vespo_megatron.families.decoder import decoder_shape, num_experts, num_layers
from vespo_megatron.families.family import Family
from vespo_megatron.families.shape import ModelShape


def _read(keys: ConfigKeys) -> ModelShape:
    keys.refuse(keys.config.get("attention_bias"), "has attention_bias", "no bias in attention")
    keys.refuse(keys.config.get("clip_qkv") is not None, "has clip_qkv", "queries, keys and values as they are")
    return decoder_shape(
        keys,
        architecture="OlmoeForCausalLM",
        is_moe_layer=[True] * num_layers(keys),
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        qk_norm="width",
        moe_intermediate_size=keys.count("intermediate_size"),
        intermediate_size=0,
        num_experts=num_experts(keys),
        num_experts_per_tok=keys.count_or("num_experts_per_tok", 8),
        norm_topk_prob=keys.flag("norm_topk_prob"),
    )


def _not_served(shape: ModelShape) -> str:
    if shape.num_key_value_heads != shape.num_attention_heads:
        return "has fewer heads of keys than of queries, and SGLang 0.5.23 gives an OLMoE's keys the norm of as many"
    return ""


FAMILY = Family(_read, not_served=_not_served)
