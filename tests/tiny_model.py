"""The model most tests run; `python tests/tiny_model.py FOLDER` writes it for a server to serve (`--sglang-url`)."""

from __future__ import annotations

import sys
from pathlib import Path


def write_tiny_qwen3_moe(folder: str | Path) -> None:
    """A random Qwen3-MoE (3 layers, hidden 64, 8 experts top-2, vocabulary 128) as transformers saves it.

    Weights are larger than transformers' initial ones, and norms are not one: a wrong layer would show.
    """
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)


if __name__ == "__main__":
    write_tiny_qwen3_moe(sys.argv[1])
