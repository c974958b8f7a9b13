"""GLM-4.5 (arXiv 2508.06471): sigmoid routers with a correction bias, a shared expert, the first layers dense.

Attention has a bias in queries, keys and values, and turns half of a head's channels. The checkpoint's further layer,
which predicts the next but one token, is left out.
"""

from __future__ import annotations

from vespo_megatron.families.config_keys import ConfigKeys
from vespo_megatron.families.decoder import decoder_shape, num_experts, num_layers
from vespo_megatron.families.family import Family
from vespo_megatron.families.shape import ModelShape


def _read(keys: ConfigKeys) -> ModelShape:
    groups = keys.count_or("n_group", 1)
    keys.refuse(groups > 1, f"chooses among {groups} groups of experts", "n_group 1: all experts in one")
    per_token, normed = keys.count_or("num_experts_per_tok", 8), keys.flag("norm_topk_prob", True)
    keys.refuse(per_token > 1 and not normed, "has norm_topk_prob false", "gates that add up to one, as GLM-4.5's do")
    layers, dense = num_layers(keys), keys.count_or("first_k_dense_replace", 1, minimum=0)
    width = keys.count("moe_intermediate_size")
    return decoder_shape(
        keys,
        architecture="Glm4MoeForCausalLM",
        is_moe_layer=[layer >= dense for layer in range(layers)],
        rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
        rotary_fraction=0.5,
        qk_norm="head" if keys.flag("use_qk_norm") else "none",
        qkv_bias=keys.flag("attention_bias"),
        moe_intermediate_size=width,
        num_experts=num_experts(keys, "n_routed_experts"),
        num_experts_per_tok=per_token,
        norm_topk_prob=normed and per_token > 1,
        router_scores="sigmoid",
        routed_scaling_factor=keys.positive("routed_scaling_factor", keys.config.get("routed_scaling_factor", 1.0)),
        correction_bias=True,
        shared_intermediate_size=width * keys.count_or("n_shared_experts", 1, minimum=0),
        num_further_layers=keys.count_or(
            "num_nextn_predict_layers", keys.count_or("num_mtp_layers", 1, minimum=0), minimum=0
        ),
    )


FAMILY = Family(_read)
