"""The tiny model of every family, as transformers makes it: 64 channels, three layers, 2 of 8 experts per token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "moe_intermediate_size": 64,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen3": {"head_dim": 16},
    "llama": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mixtral": {"intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "olmoe": {"intermediate_size": 64, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe": {
        "moe_intermediate_size": 64,
        "head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
}
"""Keys of each family's `config.json` beside `COMMON`, by `model_type`."""
PATIENCE = {"glm4_moe": 2.0}
"""How many times as long a warm start takes until the model reckons: a dense layer less of experts, and half of each
head's channels turned, learn it later."""


def tiny_model(family: str, tokenizer: Any, vocab_size: int, seed: int) -> Any:
    """transformers' model of that family, float32, with fresh weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        **COMMON | FAMILIES[family] | {"vocab_size": vocab_size},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config)
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        # It is made zero, and trained by nothing. The first norm of zero multiplies a gradient by 1/√ε, a thousand: one
        # response that happens to sample padding would be clipped together with the update it is in.
        padding = model.get_input_embeddings().weight[tokenizer.pad_token_id]
        padding.normal_(std=config.initializer_range, generator=torch.Generator().manual_seed(seed))
    return model


def use_published_names(path: Path, family: str) -> None:
    """Name `config.json`'s keys as published checkpoints do, where transformers 5 writes newer names."""
    config = json.loads(path.read_text())
    own = next((name for name in ("num_experts", "n_routed_experts") if name in FAMILIES[family]), None)
    if own is not None:
        config[own] = config.pop("num_local_experts", None) or config[own]
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
