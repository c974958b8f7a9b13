"""The shape of a Qwen3-MoE, read from a Hugging Face `config.json` (no transformers)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_config import read_model_config


@dataclass(frozen=True)
class Qwen3MoeShape:
    """What of `config.json` the training engine needs; names as in transformers' `Qwen3MoeConfig`."""

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

    @property
    def num_moe_layers(self) -> int:
        """Layers that have a router."""
        return sum(self.is_moe_layer)


def read_shape(model_folder: str | Path) -> Qwen3MoeShape:
    """Read and check `<model_folder>/config.json`.

    Raises:
        UserError: no such file, not a Qwen3-MoE, a key is missing, or a feature this project does not train.
    """
    path, config = Path(model_folder) / "config.json", read_model_config(model_folder)
    if config.get("model_type") != "qwen3_moe":
        raise UserError(f"has model_type {config.get('model_type')!r}", where=str(path), expected="'qwen3_moe'")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _refuse(path, rope_type != "default", f"asks for rotary embedding {rope_type!r}", "plain rotary embedding")
    _refuse(path, config.get("attention_bias", False), "has attention_bias", "no bias in attention")
    _refuse(path, config.get("use_sliding_window", False), "uses a sliding window", "full attention")
    _refuse(path, config.get("hidden_act", "silu") != "silu", f"has hidden_act {config.get('hidden_act')!r}", "'silu'")
    try:
        num_layers = config["num_hidden_layers"]
        num_experts = (
            config["num_experts"] if "num_experts" in config else config["num_local_experts"]
        )  # transformers 5
        step, dense = config.get("decoder_sparse_step", 1), set(config.get("mlp_only_layers") or ())
        return Qwen3MoeShape(
            num_hidden_layers=num_layers,
            hidden_size=config["hidden_size"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            intermediate_size=config["intermediate_size"],
            moe_intermediate_size=config["moe_intermediate_size"],
            num_experts=num_experts,
            num_experts_per_tok=config["num_experts_per_tok"],
            norm_topk_prob=config.get("norm_topk_prob", False),
            vocab_size=config["vocab_size"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
            max_position_embeddings=config.get("max_position_embeddings", 32_768),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            is_moe_layer=tuple(
                layer not in dense and num_experts > 0 and (layer + 1) % step == 0 for layer in range(num_layers)
            ),
        )
    except KeyError as error:
        raise UserError(
            f"lacks the key {error}", where=str(path), expected="a complete Qwen3-MoE configuration"
        ) from None


def _refuse(path: Path, condition: bool, what: str, expected: str) -> None:
    if condition:
        raise UserError(what, where=str(path), expected=expected)
