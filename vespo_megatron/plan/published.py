"""Shapes of published models, for machines that do not have their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.recipe.model_shape import read_shape, shape_of_config

_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
# The keys of each one's config.json on the Hugging Face hub that a shape is read from.
_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": _QWEN3_MOE  # Qwen/Qwen3-30B-A3B-Base
    | {
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "max_position_embeddings": 32768,
    },
    "Qwen3-235B-A22B": _QWEN3_MOE  # Qwen/Qwen3-235B-A22B
    | {
        "num_hidden_layers": 94,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "max_position_embeddings": 40960,
    },
    "Qwen3-8B": {  # Qwen/Qwen3-8B-Base
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    },
    "Llama-3.2-3B": {  # meta-llama/Llama-3.2-3B-Instruct
        "model_type": "llama",
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "OLMoE-1B-7B": {  # allenai/OLMoE-1B-7B-0924
        "model_type": "olmoe",
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "vocab_size": 50304,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
    },
    "GLM-4.5-Air": {  # zai-org/GLM-4.5-Air
        "model_type": "glm4_moe",
        "num_hidden_layers": 46,
        "hidden_size": 4096,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "attention_bias": True,
        "use_qk_norm": False,
        "partial_rotary_factor": 0.5,
        "vocab_size": 151552,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 131072,
        "num_nextn_predict_layers": 1,
    },
}
PUBLISHED = {name: shape_of_config(config, where=name) for name, config in _CONFIGS.items()}


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
