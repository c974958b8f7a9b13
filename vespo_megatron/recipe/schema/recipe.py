"""A whole recipe."""

from __future__ import annotations

import math

from vespo_megatron.recipe.schema.base import Section, section
from vespo_megatron.recipe.schema.data import DataConfig, EnvConfig
from vespo_megatron.recipe.schema.loop import GRPOConfig, LossConfig
from vespo_megatron.recipe.schema.policy import PolicyConfig
from vespo_megatron.recipe.schema.run import (
    CheckpointingConfig,
    ClusterConfig,
    ExpManagerConfig,
    GuardConfig,
    LoggerConfig,
    SlurmConfig,
)


def resolved_behavior(given: str, *, asynchronous: bool) -> str:
    """What `loss_fn.behavior` means; `auto` follows the reference (FloyedShen/VESPO).

    Its synchronous scripts (recipe/vespo/run/sync) leave veRL's rollout correction out of bypass mode: π_old is by the
    trainer. Its fully asynchronous one sets `async_training.use_rollout_log_probs=True`.
    """
    if given != "auto":
        return given
    return "rollout" if asynchronous else "recompute"


class Recipe(Section):
    """A whole recipe."""

    grpo: GRPOConfig = section(GRPOConfig)
    loss_fn: LossConfig = section(LossConfig)
    policy: PolicyConfig = section(PolicyConfig)
    data: DataConfig = section(DataConfig)
    env: EnvConfig = section(EnvConfig)
    checkpointing: CheckpointingConfig = section(CheckpointingConfig)
    guard: GuardConfig = section(GuardConfig)
    logger: LoggerConfig = section(LoggerConfig)
    cluster: ClusterConfig = section(ClusterConfig)
    slurm: SlurmConfig = section(SlurmConfig)
    exp_manager: ExpManagerConfig = section(ExpManagerConfig)

    @property
    def world_size(self) -> int:
        """Trainer processes in all."""
        return self.cluster.gpus_per_node * self.cluster.num_nodes

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the dense model: TP·PP·CP."""
        megatron = self.policy.megatron_cfg
        return (
            megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size * megatron.context_parallel_size
        )

    @property
    def data_parallel_size(self) -> int:
        """Copies of the dense model."""
        return self.world_size // self.model_parallel_size

    @property
    def rollout_batch_size(self) -> int:
        """Responses per rollout batch."""
        return self.grpo.num_prompts_per_step * self.grpo.num_generations_per_prompt

    @property
    def behavior(self) -> str:
        """What `loss_fn.behavior` means here: rollout, recompute or version."""
        return resolved_behavior(self.loss_fn.behavior, asynchronous=self.grpo.async_grpo.enabled)

    @property
    def held_versions(self) -> int:
        """Weight versions that each trainer process keeps in host memory; 0 where none but the newest is scored."""
        asynchronous = self.grpo.async_grpo
        if self.behavior != "version" or not asynchronous.enabled:
            return 0
        return math.ceil(asynchronous.staleness) + 1

    @property
    def num_mini_batches(self) -> int:
        """N: optimizer updates per rollout batch."""
        return self.rollout_batch_size // self.policy.train_global_batch_size
