"""Qwen3, dense (arXiv 2505.09388): a norm over each head of queries and keys."""

from __future__ import annotations

from vespo_megatron.families.config_keys import ConfigKeys
from vespo_megatron.families.decoder import decoder_shape
from vespo_megatron.families.family import Family
from vespo_megatron.families.shape import ModelShape


def _read(keys: ConfigKeys) -> ModelShape:
    keys.refuse(keys.config.get("attention_bias"), "has attention_bias", "no bias in attention")
    return decoder_shape(keys, architecture="Qwen3ForCausalLM", qk_norm="head")


FAMILY = Family(_read, ties_head_when_served=True)
