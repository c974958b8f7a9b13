"""Every recipe key with its type, default, bounds, meaning and source: the one home of what a recipe may say.

The shape and the key names are NeMo-RL's (https://github.com/NVIDIA-NeMo/RL, `examples/configs`); what has no
counterpart there is marked `ours`. Lengths are in tokens, times in seconds, batch sizes in responses unless a name says
prompts. What several keys may not ask for together is in `recipe.rules`.
"""

from vespo_megatron.recipe.schema.base import MISSING, Section, key, section
from vespo_megatron.recipe.schema.data import (
    CurriculumConfig,
    DataConfig,
    DatasetConfig,
    EnvConfig,
    RewardChoice,
    SetConfig,
)
from vespo_megatron.recipe.schema.generation import MAX_SAMPLING_MASK_TOKENS, GenerationConfig, SGLangConfig
from vespo_megatron.recipe.schema.loop import (
    AsyncGRPOConfig,
    GRPOConfig,
    LossConfig,
    RewardShapingConfig,
    RouterShiftConfig,
)
from vespo_megatron.recipe.schema.mismatch import MismatchConfig
from vespo_megatron.recipe.schema.policy import PolicyConfig, TokenizerConfig
from vespo_megatron.recipe.schema.quantization import QuantizationConfig
from vespo_megatron.recipe.schema.recipe import Recipe
from vespo_megatron.recipe.schema.run import (
    CheckpointingConfig,
    ClusterConfig,
    ExpManagerConfig,
    GuardConfig,
    LoggerConfig,
    SlurmConfig,
)
from vespo_megatron.recipe.schema.training import (
    DDPConfig,
    MegatronConfig,
    OptimizerConfig,
    RouterReplayConfig,
    SchedulerConfig,
    SequencePackingConfig,
)

__all__ = [
    "MAX_SAMPLING_MASK_TOKENS",
    "MISSING",
    "AsyncGRPOConfig",
    "CheckpointingConfig",
    "ClusterConfig",
    "CurriculumConfig",
    "DDPConfig",
    "DataConfig",
    "DatasetConfig",
    "EnvConfig",
    "ExpManagerConfig",
    "GRPOConfig",
    "GenerationConfig",
    "GuardConfig",
    "LoggerConfig",
    "LossConfig",
    "MegatronConfig",
    "MismatchConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "QuantizationConfig",
    "Recipe",
    "RewardChoice",
    "RewardShapingConfig",
    "RouterReplayConfig",
    "RouterShiftConfig",
    "SGLangConfig",
    "SchedulerConfig",
    "Section",
    "SequencePackingConfig",
    "SetConfig",
    "SlurmConfig",
    "TokenizerConfig",
    "key",
    "section",
]
