"""A tiny random checkpoint of every family, with the features that tell it from the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 126,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "qwen3": {"head_dim": 16},
    "llama": {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    "mixtral": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "olmoe": {
        "intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "pad_token_id": None,
        "eos_token_id": None,
    },
    "glm4_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "norm_topk_prob": True,
    },
}
"""Keys of each family's `config.json` beside `COMMON`."""


def make_family(folder: str | Path, model_type: str, **changes: Any) -> Any:
    """Write the checkpoint, float32 with spread-out weights; returns transformers' model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **(COMMON | FAMILIES[model_type] | changes)), dtype=torch.float32
    )
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.uniform_(-0.3, 0.3)
        elif name.endswith("bias"):
            tensor.normal_(0, 0.3)
        elif tensor.ndim > 1:
            tensor.normal_(0, 0.1)
        else:
            tensor.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model
