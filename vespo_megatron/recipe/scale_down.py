"""A cluster's recipe, small enough for a laptop CPU: the same layout, objective, replay and staleness on a tiny model.

What a recipe tests about itself stays (parallel sizes, N updates per rollout batch, loss, correction, routing replay,
schedule of evaluation); what makes it big goes (model, lengths, batches, nodes, GPUs).
"""

from __future__ import annotations

import copy
from math import lcm
from pathlib import Path

from vespo_megatron.errors import UserError
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
    small = copy.deepcopy(recipe)
    megatron = small.policy.megatron_cfg
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
    small.cluster.device, small.cluster.num_nodes, small.cluster.gpus_per_node = "cpu", 1, processes
    _shrink_model(small, folder)
    _shrink_batches(small, recipe.num_mini_batches, steps)
    _shrink_rollouts(small)
    small.env.num_workers = 1
    small.exp_manager.exp_dir = "runs/scaled_down"
    return small


def _shrink_model(small: Recipe, folder: Path) -> None:
    policy = small.policy
    policy.model_name, policy.tokenizer.name, policy.precision = str(folder / "model"), None, "float32"
    policy.max_total_sequence_length = TOTAL_TOKENS
    policy.sequence_packing.train_mb_tokens = MICRO_BATCH_TOKENS
    policy.megatron_cfg.layer_spec = "native"
    policy.megatron_cfg.moe_permute_fusion = policy.megatron_cfg.apply_rope_fusion = False
    # Offloading and reduced state are kernels of Transformer Engine and CUDA streams.
    policy.megatron_cfg.optimizer.optimizer_cpu_offload = False
    policy.megatron_cfg.optimizer.use_precision_aware_optimizer = False
    small.data.train.path = str(folder / "data" / "train.parquet")
    small.data.validation.path = str(folder / "data" / "validation.parquet")
    small.data.prompt_key, small.data.max_input_seq_length = "prompt", PROMPT_TOKENS


def _shrink_batches(small: Recipe, updates: int, steps: int) -> None:
    """Two responses per data parallel rank and update, in whole groups."""
    batch = lcm(2 * small.data_parallel_size, GENERATIONS)
    small.policy.train_global_batch_size, small.policy.train_micro_batch_size = batch, 2
    small.grpo.num_generations_per_prompt = GENERATIONS
    small.grpo.num_prompts_per_step = batch * updates // GENERATIONS
    small.grpo.max_num_steps, small.grpo.val_period = steps, min(small.grpo.val_period, steps)
    small.grpo.max_val_samples, small.grpo.val_num_generations = 8, 1


def _shrink_rollouts(small: Recipe) -> None:
    generation = small.policy.generation
    generation.max_new_tokens = RESPONSE_TOKENS
    server = generation.sglang_cfg
    server.num_servers, server.tensor_parallel_size, server.urls = 1, 1, []
    server.mem_fraction_static, server.context_length, server.server_args = None, None, {}
    server.max_total_tokens, server.max_concurrent_requests = 20480, 512
