"""Shapes of published models, for machines that do not have their folders."""

from __future__ import annotations

from pathlib import Path

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_shape import ModelShape, read_shape

_QWEN3_30B_A3B = ModelShape(  # config.json of Qwen/Qwen3-30B-A3B-Base on the Hugging Face hub
    num_hidden_layers=48,
    hidden_size=2048,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
    is_moe_layer=(True,) * 48,
)
_QWEN3_235B_A22B = ModelShape(  # config.json of Qwen/Qwen3-235B-A22B
    num_hidden_layers=94,
    hidden_size=4096,
    num_attention_heads=64,
    num_key_value_heads=4,
    head_dim=128,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
    is_moe_layer=(True,) * 94,
)
PUBLISHED = {"Qwen3-30B-A3B": _QWEN3_30B_A3B, "Qwen3-235B-A22B": _QWEN3_235B_A22B}


def shape_of(model: str) -> ModelShape:
    """The folder's shape, or that of the published model its name contains. Raises UserError where there is neither."""
    if (Path(model) / "config.json").is_file():
        return read_shape(model)
    for name, shape in PUBLISHED.items():
        if name.lower() in Path(model).name.lower():
            return shape
    raise UserError(
        "is no folder with a config.json, and no published model's name",
        where="policy.model_name",
        expected=f"a folder, or a name with {' or '.join(PUBLISHED)}",
    )
