"""Mixtral (arXiv 2401.04088): experts in every layer, softmax over the chosen ones, no norm of queries and keys."""

from __future__ import annotations

from vespo_megatron.families.config_keys import ConfigKeys
from vespo_megatron.families.decoder import decoder_shape, num_experts, num_layers
from vespo_megatron.families.family import Family
from vespo_megatron.families.shape import ModelShape, TensorNames

_NAMES = TensorNames(
    router="block_sparse_moe.gate.weight",
    experts="block_sparse_moe.experts.",
    gate="w1.weight",
    up="w3.weight",
    down="w2.weight",
)


def _read(keys: ConfigKeys) -> ModelShape:
    keys.refuse(keys.config.get("sliding_window"), "uses a sliding window", "full attention")
    return decoder_shape(
        keys,
        architecture="MixtralForCausalLM",
        is_moe_layer=[True] * num_layers(keys),
        rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
        qk_norm="none",
        moe_intermediate_size=keys.count("intermediate_size"),
        intermediate_size=0,
        num_experts=num_experts(keys, "num_local_experts"),
        num_experts_per_tok=keys.count_or("num_experts_per_tok", 2),
        norm_topk_prob=True,
    )


FAMILY = Family(_read, names=_NAMES)
