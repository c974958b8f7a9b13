"""A cluster's recipe, small enough for a laptop CPU: the same layout, objective, replay and staleness on a tiny model.

What a recipe tests about itself stays (parallel sizes, N updates per rollout batch, loss, correction, routing replay,
schedule of evaluation); what makes it big goes (model, lengths, batches, nodes, GPUs). Tensor parallelism is cut to
what the tiny model's key/value heads can be split by.
"""

from __future__ import annotations

from math import gcd, lcm
from pathlib import Path
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.recipe.schema import Recipe

MAX_PROCESSES = 16
"""A laptop runs so many trainer processes."""
GENERATIONS = 4
PROMPT_TOKENS, RESPONSE_TOKENS, TOTAL_TOKENS, MICRO_BATCH_TOKENS = 32, 24, 64, 4096


def scale_down(recipe: Recipe, folder: str | Path, *, steps: int = 2) -> Recipe:
    """A copy that runs on this machine's CPU.

    Args:
        folder: what `examples/tiny_moe/prepare.py` made: `model/` and `data/{train,validation}.parquet`.
        steps: rollout batches to train on.

    Raises:
        UserError: the folder was not prepared, or the layout needs more than `MAX_PROCESSES` processes.
    """
    folder = Path(folder)
    if not (folder / "model" / "config.json").is_file():
        raise UserError(
            "holds no tiny model",
            where=str(folder),
            expected="model/ and data/",
            fix=f"python examples/tiny_moe/prepare.py --output {folder}",
        )
    recipe = _with_splittable_heads(recipe, read_shape(folder / "model").num_key_value_heads)
    megatron = recipe.policy.megatron_cfg
    experts = (
        megatron.expert_model_parallel_size
        * megatron.expert_tensor_parallel_size
        * megatron.pipeline_model_parallel_size
    )
    processes = lcm(recipe.model_parallel_size, experts)
    if processes > MAX_PROCESSES:
        raise UserError(
            f"the layout needs {processes} processes",
            where="policy.megatron_cfg",
            expected=f"at most {MAX_PROCESSES} to scale down",
            fix="lower a parallel size for the trial",
        )
    small = recipe.with_values(
        {"cluster.device": "cpu", "cluster.num_nodes": 1, "cluster.gpus_per_node": processes, "env.num_workers": 1}
        | {"exp_manager.exp_dir": "runs/scaled_down"}
        | _small_model(folder)
        | _SMALL_ROLLOUTS
    )
    return small.with_values(_small_batches(small, recipe.num_mini_batches, steps))


def _with_splittable_heads(recipe: Recipe, heads: int) -> Recipe:
    megatron = recipe.policy.megatron_cfg
    size = gcd(megatron.tensor_model_parallel_size, heads)
    values = {"tensor_model_parallel_size": size, "sequence_parallel": megatron.sequence_parallel and size > 1}
    return recipe.with_values({f"policy.megatron_cfg.{name}": value for name, value in values.items()})


def _small_model(folder: Path) -> dict[str, Any]:
    # What needs a GPU goes: Transformer Engine, DeepEP. What is offloaded are the float32 weights of bfloat16 ones.
    megatron = {
        "layer_spec": "native",
        "moe_token_dispatcher_type": "alltoall",
        "moe_permute_fusion": False,
        "apply_rope_fusion": False,
        "optimizer.optimizer_cpu_offload": False,
        "optimizer.use_precision_aware_optimizer": False,
    }
    return {f"policy.megatron_cfg.{name}": value for name, value in megatron.items()} | {
        "policy.model_name": str(folder / "model"),
        "policy.tokenizer.name": None,
        "policy.precision": "float32",
        "policy.max_total_sequence_length": TOTAL_TOKENS,
        "policy.sequence_packing.train_mb_tokens": MICRO_BATCH_TOKENS,
        "data.train.sets": {},
        "data.validation.sets": {},
        "env.reward": "math",
        "env.reward_by_source": {},
        "data.train.path": str(folder / "data" / "train.parquet"),
        "data.validation.path": str(folder / "data" / "validation.parquet"),
        "data.prompt_key": "prompt",
        "data.max_input_seq_length": PROMPT_TOKENS,
    }


def _small_batches(small: Recipe, updates: int, steps: int) -> dict[str, Any]:
    """Two responses per data parallel rank and update, in whole groups."""
    batch = lcm(2 * small.data_parallel_size, GENERATIONS)
    return {
        "policy.train_global_batch_size": batch,
        "policy.train_micro_batch_size": 2,
        "grpo.num_generations_per_prompt": GENERATIONS,
        "grpo.num_prompts_per_step": batch * updates // GENERATIONS,
        "grpo.max_num_steps": steps,
        "grpo.val_period": min(small.grpo.val_period, steps),
        "grpo.max_val_samples": 8,
        "grpo.val_num_generations": 1,
    }


_SMALL_ROLLOUTS: dict[str, Any] = {
    "policy.generation.max_new_tokens": RESPONSE_TOKENS,
    "policy.generation.sglang_cfg.num_servers": 1,
    "policy.generation.sglang_cfg.tensor_parallel_size": 1,
    "policy.generation.sglang_cfg.urls": [],
    "policy.generation.sglang_cfg.mem_fraction_static": None,
    "policy.generation.sglang_cfg.context_length": None,
    "policy.generation.sglang_cfg.server_args": {},
    "policy.generation.sglang_cfg.max_total_tokens": 20480,
    "policy.generation.sglang_cfg.max_concurrent_requests": 512,
}
