"""Llama 2 and 3 (arXiv 2407.21783): no norm of queries and keys; from 3.1 on a stretched rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vespo_megatron.families.config_keys import ConfigKeys
from vespo_megatron.families.decoder import decoder_shape
from vespo_megatron.families.family import Family
from vespo_megatron.families.shape import ModelShape


def _read(keys: ConfigKeys) -> ModelShape:
    keys.refuse(keys.config.get("attention_bias"), "has attention_bias", "no bias in attention")
    return decoder_shape(keys, architecture="LlamaForCausalLM", qk_norm="none", max_position_embeddings=2048)


def _as_mixtral(config: Mapping[str, Any], experts: int, per_token: int) -> dict[str, Any]:
    return dict(config) | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": experts,
        "num_experts_per_tok": per_token,
        "sliding_window": None,
    }


FAMILY = Family(_read, as_moe=_as_mixtral, ties_head_when_served=True)
