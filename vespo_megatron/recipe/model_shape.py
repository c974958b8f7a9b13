"""The shape of a Qwen3-MoE: the one reader of a Hugging Face `config.json`. Standard library alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.json_text import parse_json

_MOST_LAYERS = 100_000
"""Far more than any model has, and few enough to list."""


@dataclass(frozen=True)
class ModelShape:
    """What of `config.json` is used here, names as in transformers' `Qwen3MoeConfig`, values checked."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    is_moe_layer: tuple[bool, ...]
    """Per layer: MoE or dense, from `mlp_only_layers` and `decoder_sparse_step`."""
    architecture: str = "Qwen3MoeForCausalLM"
    dtype: str = "float32"
    """What the folder's weights are stored in, as torch names it."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a router; the others have a dense MLP."""
        return tuple(layer for layer, is_moe in enumerate(self.is_moe_layer) if is_moe)

    @property
    def num_moe_layers(self) -> int:
        """Layers that have a router."""
        return sum(self.is_moe_layer)

    @property
    def kv_values_per_token(self) -> int:
        """Elements of one token's keys and values over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


def read_shape(model_folder: str | Path) -> ModelShape:
    """Read and check `<model_folder>/config.json`.

    Raises:
        UserError: no such file, not a Qwen3-MoE, a key is missing or holds what it cannot, or a feature this project
            does not train.
    """
    path = Path(model_folder) / "config.json"
    try:
        config = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})",
            where=str(path),
            expected="a Hugging Face model folder",
            fix="check policy.model_name (relative paths start at the current directory), or prepare the model first",
        ) from None
    except ValueError as error:
        raise UserError(f"is not JSON ({error})", where=str(path)) from None
    if not isinstance(config, dict):
        raise UserError("is not a mapping", where=str(path), expected="a Hugging Face model configuration")
    return shape_of_config(config, where=str(path))


def shape_of_config(config: Mapping[str, Any], *, where: str = "config.json") -> ModelShape:
    """The shape that the keys of a `config.json` describe; raises `UserError` as `read_shape` does, naming `where`."""
    keys = _Keys(config, where)
    if config.get("model_type") != "qwen3_moe":
        raise UserError(f"has model_type {config.get('model_type')!r}", where=where, expected="'qwen3_moe'")
    rope = _rope(keys)
    keys.refuse(config.get("attention_bias"), "has attention_bias", "no bias in attention")
    keys.refuse(config.get("use_sliding_window"), "uses a sliding window", "full attention")
    keys.refuse(config.get("hidden_act", "silu") != "silu", f"has hidden_act {config.get('hidden_act')!r}", "'silu'")
    layers, heads = keys.count("num_hidden_layers"), keys.count("num_attention_heads")
    keys.at_most(layers, "num_hidden_layers", _MOST_LAYERS, "what can be listed")
    # transformers 5 writes num_local_experts
    experts = keys.count("num_experts" if "num_experts" in config else "num_local_experts", minimum=0)
    shape = ModelShape(
        num_hidden_layers=layers,
        hidden_size=keys.count("hidden_size"),
        num_attention_heads=heads,
        num_key_value_heads=keys.count("num_key_value_heads"),
        head_dim=_head_dim(keys, heads),
        intermediate_size=keys.count("intermediate_size"),
        moe_intermediate_size=keys.count("moe_intermediate_size"),
        num_experts=experts,
        num_experts_per_tok=keys.count("num_experts_per_tok"),
        norm_topk_prob=keys.flag("norm_topk_prob"),
        vocab_size=keys.count("vocab_size"),
        rms_norm_eps=keys.positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        rope_theta=keys.positive("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        max_position_embeddings=keys.count_or("max_position_embeddings", 32_768),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        is_moe_layer=_moe_layers(keys, layers, experts),
        architecture=_architecture(keys),
        dtype=keys.text_or("dtype", config.get("dtype", config.get("torch_dtype")), ModelShape.dtype),
    )
    keys.at_most(shape.num_experts_per_tok, "num_experts_per_tok", experts or math.inf, "num_experts")
    keys.at_most(shape.num_key_value_heads, "num_key_value_heads", heads, "num_attention_heads")
    return shape


def _rope(keys: _Keys) -> Mapping[str, Any]:
    rope = keys.config.get("rope_parameters") or keys.config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise keys.error("rope_parameters", rope, "a mapping")
    kind = rope.get("rope_type", rope.get("type", "default"))
    keys.refuse(kind != "default", f"asks for rotary embedding {kind!r}", "plain rotary embedding")
    return rope


def _head_dim(keys: _Keys, heads: int) -> int:
    hidden = keys.count("hidden_size")
    if keys.config.get("head_dim") is None and hidden % heads:
        raise keys.error("hidden_size", hidden, f"a multiple of num_attention_heads, {heads}, or the key head_dim")
    return keys.count_or("head_dim", hidden // heads)


def _architecture(keys: _Keys) -> str:
    names = keys.config.get("architectures") or [ModelShape.architecture]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise keys.error("architectures", names, "a list of names")
    return names[0]


def _moe_layers(keys: _Keys, layers: int, experts: int) -> tuple[bool, ...]:
    step, dense = keys.count_or("decoder_sparse_step", 1), keys.config.get("mlp_only_layers") or ()
    if not isinstance(dense, list | tuple) or not all(_is_integer(layer) and 0 <= layer < layers for layer in dense):
        raise keys.error("mlp_only_layers", dense, f"a list of layers, 0 to {layers - 1}")
    return tuple(layer not in dense and experts > 0 and (layer + 1) % step == 0 for layer in range(layers))


@dataclass(frozen=True)
class _Keys:
    """A `config.json`'s keys, each checked as it is taken."""

    config: Mapping[str, Any]
    where: str

    def error(self, name: str, value: Any, expected: str) -> UserError:
        return UserError(f"{name} is {value!r}", where=self.where, expected=expected)

    def refuse(self, condition: Any, what: str, expected: str) -> None:
        if condition:
            raise UserError(what, where=self.where, expected=expected)

    def count(self, name: str, *, minimum: int = 1) -> int:
        """A whole number that has to be there."""
        if self.config.get(name) is None:
            raise UserError(f"lacks the key {name!r}", where=self.where, expected="a complete Qwen3-MoE configuration")
        value = self.config[name]
        if not _is_integer(value) or value < minimum:
            raise self.error(name, value, f"a whole number, at least {minimum}")
        return int(value)

    def count_or(self, name: str, default: int) -> int:
        """A whole number, or the default where the key is absent or null."""
        return default if self.config.get(name) is None else self.count(name)

    def text_or(self, name: str, value: Any, default: str) -> str:
        if value is not None and not (isinstance(value, str) and value):
            raise self.error(name, value, "a name")
        return value or default

    def flag(self, name: str) -> bool:
        value = self.config.get(name, False)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def positive(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(name, value, "a positive number")
        return value

    def at_most(self, value: int, name: str, limit: float, of: str) -> None:
        if value > limit:
            raise self.error(name, value, f"at most {of}, {limit}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
