"""NeMo-RL's keys that are not ours as they stand: renamed, combined into one, neutral, or without meaning here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SGLANG = "policy.generation.sglang_cfg"
_OPTIMIZER = "policy.megatron_cfg.optimizer"

WITHOUT_EFFECT: dict[str, str] = {
    "policy.logprob_batch_size": "passes without gradient go over the training micro-batches, whose routes they share",
    "policy.sequence_packing.logprob_mb_tokens": "passes without gradient share the training micro-batches",
}
"""Their keys that a recipe of ours may say as well, and that change nothing here; they are passed over."""


def _as_is(value: Any) -> Any:
    return value


RENAMES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "grpo.async_grpo.max_trajectory_age_steps": ("grpo.async_grpo.max_staleness", float),
    "grpo.async_grpo.in_flight_weight_updates": (
        "grpo.async_grpo.on_weight_update",
        lambda value: "in_place" if value else "drain",
    ),
    "loss_fn.use_on_policy_kl_approximation": (
        "loss_fn.reference_policy_kl_weight",
        lambda value: "behavior" if value else "score",
    ),
    "grpo.val_num_generations_per_prompt": ("grpo.val_num_generations", _as_is),
    "checkpointing.checkpoint_dir": ("exp_manager.exp_dir", _as_is),
    "policy.max_grad_norm": (f"{_OPTIMIZER}.clip_grad", _as_is),
    "policy.generation.backend": ("policy.generation.backend", lambda value: "sglang"),
    "policy.generation.vllm_cfg.tensor_parallel_size": (f"{_SGLANG}.tensor_parallel_size", _as_is),
    "policy.generation.vllm_cfg.gpu_memory_utilization": (f"{_SGLANG}.mem_fraction_static", _as_is),
    "policy.generation.vllm_cfg.max_model_len": (f"{_SGLANG}.context_length", _as_is),
    "policy.generation.vllm_cfg.precision": (f"{_SGLANG}.dtype", _as_is),
    "policy.tokenizer.chat_template_kwargs": ("policy.tokenizer.chat_template_kwargs", lambda value: value or {}),
    "data.train_data_path": ("data.train.path", _as_is),
    "data.val_data_path": ("data.validation.path", _as_is),
    "data.input_key": ("data.prompt_key", _as_is),
    "env.math.num_workers": ("env.num_workers", _as_is),
    "env.math.math_verify_impl": ("env.reward", lambda value: "math"),
}
"""Their key → ours, and what becomes of the value."""

NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "grpo.reward_scaling.enabled": ((False,), "rewards are scaled by env.rewards' weights"),
    "grpo.reward_shaping.stop_properly_penalty_coef": ((None,), "env.reward says what a truncated response earns"),
    "grpo.seq_logprob_error_threshold": ((None,), "say loss_fn.correction={reject: [{statistic: …, level: …}]}"),
    "grpo.invalid_tool_call_advantage": ((None,), "the environment's rewards judge its calls"),
    "grpo.malformed_thinking_advantage": ((None,), "the reward judges the format"),
    "grpo.stop_at_validation_metric": ((None,), "a run has grpo.max_num_steps steps"),
    "grpo.stop_at_validation_threshold": ((None,), "a run has grpo.max_num_steps steps"),
    "grpo.val_start_at": ((-1, 0, None), "evaluation begins with grpo.val_period"),
    "reward_penalties": ((None,), "the reward judges the format"),
    "reward_penalties.penalize_duplicated_reasoning": ((False,), "the reward judges the format"),
    "reward_penalties.penalize_empty_final_answer": ((False,), "the reward judges the format"),
    "reward_penalties.penalize_unwanted_tokens": ((False,), "the reward judges the format"),
    "reward_penalties.penalize_malformed_think_tag": ((False,), "the reward judges the format"),
    "loss_fn.positive_example_nll_weight": ((0, 0.0, None), "no likelihood term"),
    "policy.dtensor_cfg.enabled": ((False,), "training is Megatron-core's alone"),
    "policy.megatron_cfg.enabled": ((True,), "training is Megatron-core's alone"),
    "policy.megatron_cfg.fp8_cfg": ((None,), "16 bits and float32 only"),
    "policy.megatron_cfg.fp8_cfg.enabled": ((False,), "16 bits and float32 only"),
    "policy.megatron_cfg.peft.enabled": ((False,), "whole weights are trained"),
    "policy.megatron_cfg.optimizer.fp16": ((False,), "policy.precision=float16 says so"),
    "policy.megatron_cfg.scheduler.weight_decay_incr_style": (("constant",), "weight decay is constant"),
    "policy.megatron_cfg.distributed_data_parallel_config.use_custom_fsdp": ((False,), "DDP, optimizer sharded"),
    "policy.generation.stop_strings": ((None,), "stop by token: policy.generation.stop_token_ids"),
    "policy.generation.vllm_cfg.pipeline_parallel_size": ((1,), "a server is tensor parallel"),
    "policy.generation.vllm_cfg.num_last_layers_in_bf16": ((0,), "no fp8 rollouts"),
    "policy.generation.vllm_cfg.num_first_layers_in_bf16": ((0,), "no fp8 rollouts"),
    "data.system_prompt_file": ((None,), "put the system message into the prompt column"),
}
"""Their key → (values that ask for what is done here anyway, what that is). Any other value is not supported."""

MEANINGLESS: tuple[tuple[str, str], ...] = (
    ("grpo.async_grpo.recompute_kv_cache_after_weight_updates", "abort_and_continue does, in_place does not"),
    ("grpo.async_grpo.max_generation_failures", "policy.generation.sglang_cfg has retries and restarts"),
    ("grpo.skip_reference_policy_logprobs_calculation", "the pass is skipped where the penalty is 0"),
    ("grpo.calculate_advantages_on_gpu", "advantages are made on the host"),
    ("grpo.deduplicate_multimodal_data", "text alone"),
    ("grpo.debug_payload_metrics", "text alone"),
    ("reward_penalties.token_ids*", "off"),
    ("loss_fn.use_kl_in_reward", "off"),
    ("grpo.val_batch_size", "all validation prompts are in flight together"),
    ("grpo.reward_scaling.*", "off"),
    ("grpo.batch_multiplier", "dynamic sampling draws until the batch is full"),
    ("grpo.dynamic_sampling_max_gen_batches", "ten rounds at most"),
    ("checkpointing.checkpoint_must_save_by", "SIGTERM saves a checkpoint"),
    ("checkpointing.model_save_format", "the export is safetensors"),
    ("checkpointing.save_consolidated", "the export is one Hugging Face folder"),
    ("checkpointing.save_optimizer", "checkpoints resume exactly"),
    ("policy.generation_batch_size", "of the Hugging Face backend"),
    ("policy.megatron_recipe", "the layout is in megatron_cfg"),
    ("policy.dtensor_cfg.*", "of the DTensor backend"),
    ("policy.optimizer", "of the DTensor backend"),
    ("policy.optimizer.*", "of the DTensor backend"),
    ("policy.scheduler", "of the DTensor backend"),
    ("policy.scheduler.*", "of the DTensor backend"),
    ("policy.make_sequence_length_divisible_by", "the layout pads by itself"),
    ("policy.draft.*", "no draft model"),
    ("policy.hf_config_overrides*", "the model folder is taken as it is"),
    ("policy.dynamic_batching.*", "sequence_packing does it"),
    ("policy.sequence_packing.algorithm", "packing balances by itself"),
    ("policy.sequence_packing.sequence_length_round", "packing rounds by itself"),
    ("policy.megatron_cfg.empty_unused_memory_level", "memory is released in colocated mode"),
    ("policy.megatron_cfg.converter_type", "weights are mapped from config.json"),
    ("policy.megatron_cfg.pipeline_dtype", "policy.precision"),
    ("policy.megatron_cfg.defer_fp32_logits", "log-probs are made in tiles"),
    ("policy.logprob_chunk_size", "tiles of logits are cut by memory: policy.megatron_cfg.logprob_memory_mb"),
    ("policy.megatron_cfg.bias_activation_fusion", "of Transformer Engine's spec"),
    ("policy.megatron_cfg.env_vars*", "set the environment of the job"),
    ("policy.megatron_cfg.fp8_cfg.*", "off"),
    ("policy.megatron_cfg.peft.*", "off"),
    (f"{_OPTIMIZER}.bf16", "policy.precision"),
    (f"{_OPTIMIZER}.params_dtype", "the optimizer's weights are float32"),
    (f"{_OPTIMIZER}.sgd_momentum", "of SGD"),
    ("policy.megatron_cfg.scheduler.*_weight_decay", "weight decay is constant"),
    ("policy.megatron_cfg.distributed_data_parallel_config.average_in_collective", "the loss is a global mean"),
    ("policy.megatron_cfg.distributed_data_parallel_config.data_parallel_sharding_strategy", "of custom FSDP"),
    ("policy.generation.vllm_cfg.*", "of vLLM"),
    ("policy.generation.vllm_kwargs*", "of vLLM; SGLang's are in sglang_cfg.server_args"),
    ("policy.generation.quant_cfg*", "of vLLM"),
    ("policy.generation.colocated.*", "servers are started by sglang_cfg or given as its urls"),
    ("data.dataset_name", "prepare the set once: vespo-megatron data prepare"),
    ("data.prompt_file", "the prompt column holds the whole prompt"),
    ("data.output_key", "the ground truth is reward_model.ground_truth"),
    ("data.*_split", "one file per split"),
    ("data.default.*", "prepare the set once: vespo-megatron data prepare"),
    ("data.train.*", "prepare the set once: vespo-megatron data prepare"),
    ("data.validation*", "prepare the set once: vespo-megatron data prepare"),
    ("data.use_multiple_dataloader", "one file per split"),
    ("env.*", "rewards are env.reward"),
    ("logger.*", "metrics.jsonl, TensorBoard and the report"),
    ("cluster.segment_size", "of their scheduler"),
)
"""Pattern of their keys → why they have no meaning here; tried after everything above."""
