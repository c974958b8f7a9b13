"""Keys of the model: `policy`."""

from __future__ import annotations

from typing import Any, Literal

from vespo_megatron.recipe.schema.base import MISSING, Section, key, section
from vespo_megatron.recipe.schema.generation import GenerationConfig
from vespo_megatron.recipe.schema.quantization import QuantizationConfig
from vespo_megatron.recipe.schema.training import MegatronConfig, RouterReplayConfig, SequencePackingConfig


class TokenizerConfig(Section):
    """`policy.tokenizer`."""

    name: str | None = key(None, "Folder or hub name; None: policy.model_name.")
    chat_template: bool = key(True, "Apply the tokenizer's chat template to prompts that are messages.", ours=True)
    chat_template_file: str | None = key(None, "A Jinja file in place of the tokenizer's own template.", ours=True)
    chat_template_kwargs: dict[str, Any] = key(
        {}, "Arguments of the template, as in {enable_thinking: false} for Qwen3.", ours=True
    )


class PolicyConfig(Section):
    """`policy`: the model, how it is trained, how it generates."""

    model_name: str = key(MISSING, "Hugging Face folder with config.json and safetensors.")
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    train_global_batch_size: int = key(256, "Responses per optimizer update: N is the rollout batch over this.", ge=1)
    train_micro_batch_size: int = key(4, "Sequences per micro-batch when sequence packing is off.", ge=1)
    max_total_sequence_length: int = key(1024, "Prompt and response together.", ge=1)
    precision: Literal["float32", "bfloat16", "float16"] = key(
        "bfloat16", "Numerics of weights and activations; float16 trains with a loss scale (megatron_cfg.optimizer)."
    )
    megatron_cfg: MegatronConfig = section(MegatronConfig)
    sequence_packing: SequencePackingConfig = section(SequencePackingConfig)
    router_replay: RouterReplayConfig = section(RouterReplayConfig)
    quantization: QuantizationConfig = section(QuantizationConfig)
    generation: GenerationConfig = section(GenerationConfig)

    @property
    def in_16_bits(self) -> bool:
        """Whether the optimizer keeps float32 weights beside those that are computed with."""
        return self.precision != "float32"
