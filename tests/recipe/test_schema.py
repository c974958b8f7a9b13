"""The schema: every number has bounds that are kept, defaults keep them, and a recipe that was made stays as it is."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vespo_megatron.cli import main
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.documentation import documentation
from vespo_megatron.recipe.loader import flatten
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.recipe.schema.describe import bounds, keys_of, members, section_of

MEGATRON, SERVER = "policy.megatron_cfg", "policy.generation.sglang_cfg"
NOTHING = None
"""No bound on that side."""
COUNTS = """
    grpo.num_prompts_per_step grpo.num_generations_per_prompt grpo.max_num_steps grpo.max_num_epochs
    grpo.pass_at_k grpo.max_val_samples grpo.val_num_generations grpo.reward_shaping.overlong_buffer_length
    grpo.reward_shaping.max_response_length grpo.async_grpo.sync_every loss_fn.aggregation_length
    policy.train_global_batch_size policy.train_micro_batch_size policy.max_total_sequence_length
    policy.sequence_packing.train_mb_tokens policy.generation.max_new_tokens
    policy.megatron_cfg.tensor_model_parallel_size policy.megatron_cfg.pipeline_model_parallel_size
    policy.megatron_cfg.virtual_pipeline_model_parallel_size policy.megatron_cfg.num_layers_in_first_pipeline_stage
    policy.megatron_cfg.num_layers_in_last_pipeline_stage policy.megatron_cfg.context_parallel_size
    policy.megatron_cfg.expert_model_parallel_size policy.megatron_cfg.expert_tensor_parallel_size
    policy.megatron_cfg.logprob_memory_mb policy.megatron_cfg.scheduler.lr_decay_iters
    policy.generation.mismatch.group_size policy.quantization.group_size
    policy.generation.sglang_cfg.num_servers policy.generation.sglang_cfg.tensor_parallel_size
    policy.generation.sglang_cfg.context_length policy.generation.sglang_cfg.max_total_tokens
    policy.generation.sglang_cfg.max_concurrent_requests data.max_input_seq_length data.train.max_samples
    data.train.num_samples data.validation.num_samples data.num_workers data.shuffle_buffer
    data.validation.max_samples env.num_workers checkpointing.keep_top_k checkpointing.keep_last
    policy.megatron_cfg.optimizer.loss_scale_window policy.megatron_cfg.optimizer.hysteresis
    guard.max_skipped_updates guard.window cluster.gpus_per_node cluster.num_nodes slurm.cpus_per_node
    env.max_tokens_per_turn grpo.max_rollout_turns
""".split()
NOT_NEGATIVE = """
    grpo.reward_shaping.overlong_buffer_penalty grpo.async_grpo.max_staleness grpo.async_grpo.staleness_threshold
    data.train.temperature data.validation.temperature
    data.curriculum.rest
    grpo.val_period grpo.seed grpo.advantage_clip_high loss_fn.reference_policy_kl_penalty loss_fn.entropy_coefficient
    loss_fn.expected_k3
    policy.megatron_cfg.optimizer.min_lr policy.megatron_cfg.optimizer.weight_decay
    policy.megatron_cfg.optimizer.clip_grad policy.megatron_cfg.scheduler.lr_warmup_iters
    policy.megatron_cfg.scheduler.lr_warmup_init policy.generation.val_temperature
    policy.megatron_cfg.moe_aux_loss_coeff policy.generation.mismatch.log_prob_noise
    policy.generation.sglang_cfg.health_timeout policy.generation.sglang_cfg.max_restarts checkpointing.save_period
    guard.max_bundles logger.profile_step logger.num_val_samples_to_print cluster.watchdog_timeout
    cluster.stop_timeout slurm.rollout_nodes slurm.checkpoint_lead policy.generation.sglang_cfg.first_server
    env.num_environments
""".split()
POSITIVE = """
    loss_fn.kl_input_clamp_value loss_fn.kl_output_clamp_value
    policy.megatron_cfg.distributed_timeout policy.megatron_cfg.optimizer.lr policy.megatron_cfg.optimizer.adam_eps
    policy.megatron_cfg.moe_z_loss_coeff policy.megatron_cfg.optimizer.min_loss_scale
    policy.generation.temperature policy.generation.sglang_cfg.startup_timeout
    policy.generation.sglang_cfg.request_timeout policy.generation.sglang_cfg.recovery_timeout env.timeout
    policy.generation.sglang_cfg.weight_update_timeout env.turn_timeout
    data.train.weight data.validation.weight
    checkpointing.timeout grpo.async_grpo.learning_rate_lag guard.reward_drop guard.loss_spike
""".split()
# Key → the largest value that is too low and the smallest that is too high; stated here and nowhere taken from.
TOO_LOW_TOO_HIGH: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(COUNTS, (0, NOTHING)),
    **dict.fromkeys(NOT_NEGATIVE, (-1e-300, NOTHING)),
    **dict.fromkeys(POSITIVE, (0.0, NOTHING)),
    "grpo.advantage_clip_low": (-1000.001, 1e-300),
    "policy.megatron_cfg.moe_router_bias_update_rate": (-1e-300, 1.0000001),
    "grpo.oversample": (0.999999, 8.000001),
    "data.curriculum.min_solved": (-1e-300, 1.0000001),
    "data.curriculum.max_solved": (-1e-300, 1.0000001),
    "data.curriculum.solved_above": (-1000.001, 1000.001),
    "loss_fn.ess_base": (0.0, 1.0000001),
    "data.train.top_p": (0.0, 1.0000001),
    "data.validation.top_p": (0.0, 1.0000001),
    "loss_fn.router_shift.floor": (0.0, 1.0000001),
    "guard.length_drop": (0.0, 1.0000001),
    "guard.truncated_share": (0.0, 1.0000001),
    "guard.entropy_drop": (0.0, 1.0000001),
    f"{MEGATRON}.optimizer.adam_beta1": (-1e-300, 1.0),
    f"{MEGATRON}.optimizer.adam_beta2": (-1e-300, 1.0),
    f"{MEGATRON}.optimizer.optimizer_offload_fraction": (-1e-300, 1.0000001),
    f"{MEGATRON}.optimizer.initial_loss_scale": (0.0, 2.0**32 + 1),
    "policy.generation.top_p": (0.0, 1.0000001),
    "policy.generation.val_top_p": (0.0, 1.0000001),
    "policy.generation.top_k": (-2, NOTHING),
    "policy.generation.min_p": (-1e-300, 1.0),
    "policy.generation.mismatch.route_flip": (-1e-300, 1.0000001),
    f"{SERVER}.mem_fraction_static": (0.0, 1.0),
    f"{SERVER}.port": (-1, 65536),
    f"{SERVER}.weight_bucket_bytes": (7, NOTHING),
}
KINDS = {name: members(field.annotation) for name, field in keys_of(Recipe) if section_of(field) is None}
NUMERIC = sorted(name for name, kinds in KINDS.items() if int in kinds or float in kinds)


def refused(name: str, value: float) -> None:
    with pytest.raises(UserError) as error:
        Recipe().with_values({name: value})
    assert error.value.where == name


def test_every_number_has_its_bounds_stated_here_too():
    assert sorted(TOO_LOW_TOO_HIGH) == NUMERIC
    for name, field in keys_of(Recipe):
        if name in NUMERIC:
            assert bounds(field), f"{name} has no bound in the schema"


@given(st.sampled_from(NUMERIC), st.data())
def test_a_number_out_of_its_range_is_refused_by_name(name, data):
    low, high = TOO_LOW_TOO_HIGH[name]
    whole = float not in KINDS[name]
    below = st.integers(-(2**70), math.floor(low)) if whole else st.floats(max_value=low, allow_nan=False)
    sides = [below]
    if high is not None:
        sides.append(st.integers(math.ceil(high), 2**70) if whole else st.floats(min_value=high, allow_nan=False))
    if not whole:
        sides.append(st.sampled_from([math.nan, math.inf, -math.inf]))
    refused(name, data.draw(st.one_of(sides)))


@given(st.sampled_from(NUMERIC), st.sampled_from([True, "many", [1], {"a": 1}]))
def test_what_is_no_number_is_refused_by_name(name, value):
    refused(name, value)


@pytest.mark.parametrize("name", NUMERIC)
def test_the_command_refuses_it_before_a_process_starts(name, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("policy: {model_name: m}\n")
    low, _ = TOO_LOW_TOO_HIGH[name]
    value = math.floor(low) if float not in KINDS[name] else low
    assert main(["recipe", "check", str(recipe), f"{name}={value}"]) == 2
    said = capsys.readouterr().err
    assert f"{name}: is {value}" in said and f"command line: {name}" in said


def test_zero_tokens_to_draw_from_are_none():
    refused("policy.generation.top_k", 0)


def test_defaults_are_values_that_their_keys_take():
    Recipe().with_values(flatten(Recipe()))


def test_a_recipe_stays_as_it_is():
    recipe = Recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.grpo.seed = 7
    with pytest.raises(ValidationError, match="frozen"):
        recipe.grpo = recipe.grpo
    other = recipe.with_values({"grpo.seed": 7, "loss_fn.hyperparameters": {"c1_pos": 1.0}})
    assert (recipe.grpo.seed, other.grpo.seed) == (42, 7) and recipe.loss_fn.hyperparameters == {}


def test_an_unknown_key_of_another_recipe_names_the_nearest():
    with pytest.raises(UserError, match=r"grpo\.sed; the nearest known key is grpo\.seed"):
        Recipe().with_values({"grpo.sed": 7})


def test_the_documentation_says_type_bounds_default_and_source():
    told = documentation()
    assert told["grpo.max_num_steps"] == "Rollout batches to train on. [int, at least 1; default 100]"
    assert told["policy.generation.top_p"].endswith("[float, in (0, 1]; default 1.0]")
    assert (
        told["loss_fn.behavior"].startswith("(ours) ")
        and "one of auto, rollout, recompute, version" in told["loss_fn.behavior"]
    )
    assert all(told.values()), [name for name, text in told.items() if not text]
