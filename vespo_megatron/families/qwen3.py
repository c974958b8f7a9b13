"""Qwen3, dense (arXiv 2505.09388): a norm over each head of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vespo_megatron.families.config_keys import ConfigKeys
from vespo_megatron.families.decoder import decoder_shape
from vespo_megatron.families.family import Family
from vespo_megatron.families.shape import ModelShape


def _read(keys: ConfigKeys) -> ModelShape:
    keys.refuse(keys.config.get("attention_bias"), "has attention_bias", "no bias in attention")
    return decoder_shape(keys, architecture="Qwen3ForCausalLM", qk_norm="head")


def _as_qwen3_moe(config: Mapping[str, Any], experts: int, per_token: int) -> dict[str, Any]:
    return dict(config) | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "moe_intermediate_size": config["intermediate_size"],
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


FAMILY = Family(_read, as_moe=_as_qwen3_moe, ties_head_when_served=True)
