"""A `config.json` with round numbers, for tests that need a model's shape and no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.recipe.model_shape import shape_of_config

CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
}


def shape(**changes: Any) -> ModelShape:
    """The shape of `CONFIG` with these keys changed."""
    return shape_of_config(CONFIG | changes)


def write_config(folder: Path, **changes: Any) -> None:
    """`config.json` in a folder: `CONFIG` with these keys changed."""
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
