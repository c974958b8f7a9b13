"""Some layers of Qwen3-30B-A3B at their real widths, with random weights that are made where they are used.

Embedding, output layer and vocabulary are the model's own. On a CPU the widths are a sixteenth, so that scripts can be
tried there.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

PACK_TOKENS = 16384
MODEL_LAYERS = 48


def share(device: str) -> int:
    """What widths are divided by."""
    return 1 if device == "cuda" else 16


def pack_tokens(device: str) -> int:
    """Tokens of a micro-batch."""
    return PACK_TOKENS // share(device)


def write_config(layers: int, device: str, folder: Path) -> None:
    """Qwen3-30B-A3B's config.json with `layers` of its 48 layers."""
    part = share(device)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936 // part,
        "hidden_size": 2048 // part,
        "intermediate_size": 6144 // part,
        "moe_intermediate_size": 768 // part,
        "num_hidden_layers": layers,
        "num_attention_heads": 32 // min(part, 8),
        "num_key_value_heads": 4,
        "head_dim": 128 // part,
        "num_experts": 128 // part,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "max_position_embeddings": PACK_TOKENS,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def make_samples(packs: int, tokens: int, vocabulary: int) -> list:
    """Responses log-normal in length, prompts of a 64th of the pack; about `packs` micro-batches of `tokens`."""
    from vespo_megatron.data.sample import Sample

    chance, samples, prompt = np.random.default_rng(0), [], tokens // 64
    while sum(sample.num_tokens for sample in samples) < 0.95 * packs * tokens:
        length = int(np.clip(chance.lognormal(np.log(tokens / 8), 0.8), 16, tokens - prompt))
        name = str(len(samples))
        samples.append(
            Sample(
                sample_id=name,
                prompt_id=name,
                prompt_ids=chance.integers(3, vocabulary, prompt),
                response_ids=chance.integers(3, vocabulary, length),
                behavior_log_probs=np.full(length, -np.log(vocabulary)),
                weight_versions=np.zeros(length),
                finish_reason="stop",
            )
        )
    return samples


def make_batch(packs: int, tokens: int, vocabulary: int):
    """`make_samples` with advantages."""
    from vespo_megatron.data.batch import Batch

    samples = make_samples(packs, tokens, vocabulary)
    return Batch(samples, np.random.default_rng(1).normal(size=len(samples)).astype(np.float32))


def make_recipe(device: str, model: Path, responses: int, **more: float):
    """As the 30B's, on one device; `more` are keys of the optimizer.

    Its recipes give a quarter of the vocabulary 1,536 MiB for logits (TP4): enough to keep those of a whole pack.
    """
    from vespo_megatron.recipe.schema import Recipe

    return Recipe().with_values(
        {
            "policy.model_name": str(model),
            "policy.precision": "bfloat16" if device == "cuda" else "float32",
            "policy.megatron_cfg.logprob_memory_mb": 6144 if device == "cuda" else 64,
            "policy.sequence_packing.train_mb_tokens": pack_tokens(device),
            "policy.train_global_batch_size": responses,
            **{f"policy.megatron_cfg.optimizer.{name}": value for name, value in more.items()},
        }
    )


def start(device: str, folder: Path):
    """megatron-core's parallel state of one process."""
    from vespo_megatron.megatron import parallel
    from vespo_megatron.recipe.schema import MegatronConfig

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    store = f"file://{folder}/store"
    return parallel.initialize(MegatronConfig(), seed=1, device=torch.device(device), init_method=store)


def make_policy(policy_config, rank_info):
    """The policy with the weights that megatron-core draws: nothing is read."""
    from vespo_megatron.megatron import hf_weights
    from vespo_megatron.megatron.policy import MegatronPolicy

    with mock.patch.object(hf_weights, "load"):
        return MegatronPolicy(policy_config, rank_info, total_updates=1000)


def free(policy) -> None:
    """Give the memory of weights, gradients and optimizer back, whoever still refers to them."""
    from vespo_megatron.megatron.optimizer_state import parts_of

    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.untyped_storage().resize_(0)
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.grad_data.untyped_storage().resize_(0)
    for part in parts_of(policy.optimizer):
        for parameter, state in part.optimizer.state.items():
            for tensor in (parameter, *(each for each in state.values() if isinstance(each, torch.Tensor))):
                tensor.untyped_storage().resize_(0)


def whole_model(shape):
    """The shape with all its layers."""
    return replace(shape, num_hidden_layers=MODEL_LAYERS, is_moe_layer=(True,) * MODEL_LAYERS)
