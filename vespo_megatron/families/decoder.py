"""What the families have in common: pre-norm decoders with grouped-query attention, rotary embedding and SiLU MLPs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vespo_megatron.families.config_keys import ConfigKeys, is_integer
from vespo_megatron.families.shape import ModelShape, RopeScaling

_MOST_LAYERS = 100_000
"""Far more than any model has, and few enough to list."""


def decoder_shape(
    keys: ConfigKeys,
    *,
    architecture: str,
    is_moe_layer: Sequence[bool] | None = None,
    rms_norm_eps: float = 1e-6,
    max_position_embeddings: int = 32_768,
    rotary_fraction: float = 1.0,
    **features: Any,
) -> ModelShape:
    """The shape of such a decoder; raises `UserError` for what is missing, wrong or not trained here.

    Args:
        architecture: its class in transformers and in SGLang, where `config.json` names none.
        is_moe_layer: per layer; None: every layer is dense.
        rms_norm_eps: where `config.json` has none, as the next two.
        features: what else is said of the family, as fields of `ModelShape`.
    """
    config = keys.config
    keys.refuse(config.get("hidden_act", "silu") != "silu", f"has hidden_act {config.get('hidden_act')!r}", "'silu'")
    keys.refuse(config.get("use_sliding_window"), "uses a sliding window", "full attention")
    keys.refuse(config.get("mlp_bias"), "has mlp_bias", "no bias in MLPs")
    rope, layers, heads = _rope(keys), num_layers(keys), keys.count("num_attention_heads")
    key_value_heads = keys.count_or("num_key_value_heads", heads)
    keys.at_most(key_value_heads, "num_key_value_heads", heads, "num_attention_heads")
    dense: dict[str, Any] = {
        "moe_intermediate_size": 0,
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "norm_topk_prob": False,
    }
    shape = ModelShape(
        **dense
        | {
            "model_type": config["model_type"],
            "num_hidden_layers": layers,
            "hidden_size": keys.count("hidden_size"),
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "head_dim": _head_dim(keys, heads),
            "intermediate_size": keys.count("intermediate_size"),
            "vocab_size": keys.count("vocab_size"),
            "rms_norm_eps": keys.positive("rms_norm_eps", config.get("rms_norm_eps", rms_norm_eps)),
            "rope_theta": keys.positive("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
            "rope_scaling": _scaling(keys, rope),
            "rotary_fraction": _rotary_fraction(keys, rope, rotary_fraction),
            "max_position_embeddings": keys.count_or("max_position_embeddings", max_position_embeddings),
            "tie_word_embeddings": keys.flag("tie_word_embeddings"),
            "is_moe_layer": tuple(is_moe_layer or (False,) * layers),
            "architecture": _architecture(keys, architecture),
            "dtype": keys.text_or("dtype", config.get("dtype", config.get("torch_dtype")), ModelShape.dtype),
        }
        | features
    )
    if shape.num_moe_layers:
        keys.at_most(shape.num_experts_per_tok, "num_experts_per_tok", shape.num_experts or math.inf, "num_experts")
    return shape


def num_layers(keys: ConfigKeys) -> int:
    """Layers of the decoder."""
    layers = keys.count("num_hidden_layers")
    keys.at_most(layers, "num_hidden_layers", _MOST_LAYERS, "what can be listed")
    return layers


def num_experts(keys: ConfigKeys, name: str = "num_experts", *, minimum: int = 1) -> int:
    """Experts of a layer: under the family's own name, or `num_local_experts`, which transformers 5 writes."""
    return keys.count(name if name in keys.config else "num_local_experts", minimum=minimum)


def _rope(keys: ConfigKeys) -> Mapping[str, Any]:
    rope = keys.config.get("rope_parameters") or keys.config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise keys.error("rope_parameters", rope, "a mapping")
    kind = rope.get("rope_type", rope.get("type", "default"))
    keys.refuse(kind not in ("default", "llama3"), f"asks for rotary embedding {kind!r}", "a plain one, or 'llama3'")
    return rope


def _scaling(keys: ConfigKeys, rope: Mapping[str, Any]) -> RopeScaling | None:
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return None
    inner = ConfigKeys(rope, f"{keys.where}, rope_parameters")
    factor, low, high = (
        inner.positive(name, rope.get(name)) for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    scaling = RopeScaling(factor, low, high, inner.count("original_max_position_embeddings"))
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise inner.error("high_freq_factor", scaling.high_freq_factor, f"more than {scaling.low_freq_factor}")
    return scaling


def _rotary_fraction(keys: ConfigKeys, rope: Mapping[str, Any], default: float) -> float:
    name = "partial_rotary_factor"
    value = keys.positive(name, rope.get(name, keys.config.get(name, default)))
    if value > 1:
        raise keys.error(name, value, "at most 1")
    return value


def _head_dim(keys: ConfigKeys, heads: int) -> int:
    hidden = keys.count("hidden_size")
    if keys.config.get("head_dim") is None and hidden % heads:
        raise keys.error("hidden_size", hidden, f"a multiple of num_attention_heads, {heads}, or the key head_dim")
    return keys.count_or("head_dim", hidden // heads)


def _architecture(keys: ConfigKeys, default: str) -> str:
    names = keys.config.get("architectures") or [default]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise keys.error("architectures", names, "a list of names")
    return names[0]


def listed_layers(keys: ConfigKeys, name: str, layers: int) -> Sequence[int]:
    """The layers that a key lists; none where it is absent or null."""
    listed = keys.config.get(name) or ()
    if not isinstance(listed, list | tuple) or not all(is_integer(layer) and 0 <= layer < layers for layer in listed):
        raise keys.error(name, listed, f"a list of layers, 0 to {layers - 1}")
    return listed
