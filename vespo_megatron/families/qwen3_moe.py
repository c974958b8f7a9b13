"""Qwen3-MoE (arXiv 2505.09388): a norm over each head of queries and keys, softmax routers."""

from __future__ import annotations

from vespo_megatron.families.config_keys import ConfigKeys
from vespo_megatron.families.decoder import decoder_shape, listed_layers, num_experts, num_layers
from vespo_megatron.families.family import Family
from vespo_megatron.families.shape import ModelShape


def _read(keys: ConfigKeys) -> ModelShape:
    keys.refuse(keys.config.get("attention_bias"), "has attention_bias", "no bias in attention")
    experts = num_experts(keys, minimum=0)
    return decoder_shape(
        keys,
        architecture="Qwen3MoeForCausalLM",
        is_moe_layer=_moe_layers(keys, experts),
        qk_norm="head",
        moe_intermediate_size=keys.count("moe_intermediate_size"),
        num_experts=experts,
        num_experts_per_tok=keys.count("num_experts_per_tok"),
        norm_topk_prob=keys.flag("norm_topk_prob"),
    )


def _moe_layers(keys: ConfigKeys, experts: int) -> list[bool]:
    layers, step = num_layers(keys), keys.count_or("decoder_sparse_step", 1)
    dense = listed_layers(keys, "mlp_only_layers", layers)
    return [layer not in dense and experts > 0 and (layer + 1) % step == 0 for layer in range(layers)]


def _not_served(shape: ModelShape) -> str:
    if shape.num_experts > 0 and shape.num_moe_layers != shape.num_hidden_layers:
        dense = sorted(set(range(shape.num_hidden_layers)) - set(shape.moe_layers))
        return f"layers {dense} are dense, and SGLang 0.5.23 gives every layer of a Qwen3-MoE experts"
    return ""


FAMILY = Family(_read, not_served=_not_served)
