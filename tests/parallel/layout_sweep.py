"""Every layout of one to eight processes that `recipe check` lets a family of models have, and what its ranks run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from layout_work import build, micro_batches, ragged_batch, weighted_loss

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.recipe.model_rules import model_problems
from vespo_megatron.recipe.rules import problems
from vespo_megatron.recipe.schema import Recipe

PROCESSES = range(1, 9)
SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
FAMILIES: dict[str, dict[str, Any]] = {
    "a dense layer among sparse ones": {},
    "one expert per token, tied": {"num_experts_per_tok": 1, "tie_word_embeddings": True},
    "by threes": {
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 36,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
    },
    "by sevens": {
        "num_hidden_layers": 7,
        "num_attention_heads": 7,
        "num_key_value_heads": 7,
        "num_experts": 7,
        "moe_intermediate_size": 35,
        "mlp_only_layers": [3],
        "intermediate_size": 70,
    },
    "dense, by fives": {
        "num_hidden_layers": 5,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "intermediate_size": 100,
        "mlp_only_layers": [0, 1, 2, 3, 4],
    },
}
"""Of `random_checkpoint.make_checkpoint`: what differs."""


_RECIPE = Recipe().with_values(
    {
        "cluster.device": "cpu",
        "data.train.path": "train.parquet",
        "data.max_input_seq_length": 32,
        "grpo.num_prompts_per_step": 840,
        "policy.model_name": "a model",
        "policy.precision": "float32",
        "policy.max_total_sequence_length": 64,
        "policy.train_global_batch_size": 840,
        "policy.generation.max_new_tokens": 32,
    }
)


def allowed(shape: ModelShape, world: int, layout: dict[str, Any]) -> bool:
    """Whether the recipe's rules have nothing against it."""
    recipe = _RECIPE.with_values(
        {"cluster.gpus_per_node": world} | {f"policy.megatron_cfg.{name}": value for name, value in layout.items()}
    )
    return not any(problems(recipe)) and not any(model_problems(recipe, shape))


def layouts(shape: ModelShape) -> Iterator[tuple[int, dict[str, Any]]]:
    """(processes, keys of `policy.megatron_cfg`) of every one that is allowed."""
    for world in PROCESSES:
        for sizes in itertools.product([size for size in PROCESSES if world % size == 0], repeat=len(SIZES)):
            tensor, pipeline, context, expert, expert_tensor = sizes
            if world % (tensor * pipeline * context) or world % (expert * expert_tensor * pipeline):
                continue  # as the rules say, but in no time
            for virtual, dispatcher in itertools.product((None, 2, 3), ("alltoall", "allgather")):
                layout = dict(zip(SIZES, sizes, strict=True)) | {
                    "virtual_pipeline_model_parallel_size": virtual,
                    "sequence_parallel": tensor > 1,
                    "moe_token_dispatcher_type": dispatcher,
                }
                if allowed(shape, world, layout):
                    yield world, layout


def name_of(world: int, layout: dict[str, Any]) -> str:
    """As in 4·TP2·EP2 allgather."""
    short = zip(("TP", "PP", "CP", "EP", "ETP"), SIZES, strict=True)
    parts = [f"{letters}{layout[size]}" for letters, size in short if layout.get(size, 1) > 1]
    parts += [f"VPP{virtual}"] if (virtual := layout.get("virtual_pipeline_model_parallel_size")) else []
    return "·".join([str(world), *parts]) + f" {layout.get('moe_token_dispatcher_type', 'alltoall')}"


def one_update(folder: str, layout: dict[str, Any], store: str) -> dict[str, float]:
    """This rank's share of the loss, and the gradient's norm, of an update of two micro-batches of other lengths."""
    policy = build(folder, layout, store)
    count = layout.get("pipeline_model_parallel_size", 1) if layout.get("virtual_pipeline_model_parallel_size") else 2
    result = policy.update(micro_batches(policy, ragged_batch(), count=max(count, 2)), weighted_loss)
    share = sum(result.reports) if result.reports and policy.rank_info.tensor_rank == 0 else torch.zeros(())
    return {"loss": float(share), "grad_norm": result.grad_norm}
