"""NeMo-RL's recipes: every key is accounted for, and what carries over is a recipe that means the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from vespo_megatron.cli import main
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.recipe.nemo_rl import DIFFERS, IGNORED, REFUSED, RENAMED, SAME, UNKNOWN, translate

FOLDER = Path(__file__).parent / "nemo_rl"
RECIPE = FOLDER / "qwen3_30b_a3b.yaml"


def changed(tmp_path, text):
    path = tmp_path / "theirs.yaml"
    path.write_text(f"defaults: {RECIPE}\n{text}\n")
    return path


def kinds(path):
    return {finding.key: finding.kind for finding in translate(path)[1]}


def test_every_key_of_their_qwen3_30b_a3b_recipe_is_accounted_for():
    found = kinds(RECIPE)
    assert len(found) > 150
    assert not [key for key, kind in found.items() if kind in (REFUSED, UNKNOWN)]
    assert found["grpo.seed"] == SAME
    assert found["policy.max_grad_norm"] == RENAMED
    assert found["policy.dtensor_cfg._v2"] == IGNORED


def test_what_carries_over_means_the_same():
    recipe, _ = translate(RECIPE)
    assert (recipe.grpo.num_prompts_per_step, recipe.grpo.max_num_steps) == (32, 500)
    assert recipe.policy.megatron_cfg.expert_model_parallel_size == 8
    assert recipe.policy.megatron_cfg.optimizer.clip_grad == 0.5
    assert recipe.policy.sequence_packing.train_mb_tokens == 4096  # ${mul:…}
    assert recipe.policy.generation.sglang_cfg.tensor_parallel_size == 2
    assert (recipe.loss_fn.name, recipe.loss_fn.aggregation) == ("grpo", "token-mean")
    assert recipe.loss_fn.hyperparameters == {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": None}
    assert recipe.loss_fn.behavior == "recompute"
    assert recipe.exp_manager.exp_dir == "results/y"


def test_their_switches_choose_the_objective(tmp_path):
    switches = (
        "sequence_level_importance_ratios: true, use_importance_sampling_correction: true, token_level_loss: false"
    )
    recipe, _ = translate(changed(tmp_path, f"loss_fn: {{{switches}}}"))
    assert (recipe.loss_fn.name, recipe.loss_fn.aggregation) == ("gspo", "seq-mean-token-mean")
    assert recipe.loss_fn.hyperparameters == {"clip_low": 0.1, "clip_high": 0.3, "log_ratio_max": None}
    assert recipe.loss_fn.correction == {"weight": "tis", "level": "sequence", "high": math.inf}


def test_their_routers_losses_carry_over(tmp_path):
    text = "{moe_router_load_balancing_type: aux_loss, moe_aux_loss_coeff: 0.001, moe_z_loss_coeff: 0.0001}"
    recipe, found = translate(changed(tmp_path, f"policy: {{megatron_cfg: {text}}}"))
    megatron = recipe.policy.megatron_cfg
    assert (megatron.moe_router_load_balancing_type, megatron.moe_aux_loss_coeff) == ("aux_loss", 0.001)
    assert megatron.moe_z_loss_coeff == 0.0001
    assert not [finding.key for finding in found if finding.kind in (REFUSED, UNKNOWN)]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("policy: {megatron_cfg: {enabled: false}}", "policy.megatron_cfg.enabled"),
        ("grpo: {adv_estimator: {name: opd}}", "grpo.adv_estimator.name"),
        ("grpo: {adv_estimator: {name: gdpo, reward_weights: [1.0, 2.0]}}", "grpo.adv_estimator.reward_weights"),
        ("grpo: {seq_logprob_error_threshold: 1.5}", "grpo.seq_logprob_error_threshold"),
        ("loss_fn: {use_kl_in_reward: true}", "loss_fn.use_kl_in_reward"),
        ("grpo: {a_key_of_tomorrow: 1}", "grpo.a_key_of_tomorrow"),
    ],
)
def test_what_would_change_training_is_refused_by_name(text, key, tmp_path, capsys):
    assert main(["recipe", "check", "--from", "nemo-rl", str(changed(tmp_path, text))]) == 2
    printed = capsys.readouterr()
    assert key in printed.err and "1 of" in printed.err
    assert "carries over" in printed.out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"advantage_estimator": "auto", "normalize_rewards": True, "use_leave_one_out_baseline": True}),
        ("grpo: {adv_estimator: {use_leave_one_out_baseline: false}}", {"use_leave_one_out_baseline": False}),
        (
            "grpo: {adv_estimator: {name: reinforce_plus_plus}}",
            {"advantage_estimator": "reinforce_plus_plus_baseline_tokens"},
        ),
        (
            "grpo: {adv_estimator: {name: reinforce_plus_plus, minus_baseline: false}}",
            {"advantage_estimator": "reinforce_plus_plus_tokens"},
        ),
        ("grpo: {adv_estimator: {name: gdpo}}", {"advantage_estimator": "gdpo"}),
        ("grpo: {overlong_filtering: true}", {"overlong": "drop", "overlong_in_baseline": True}),
        ("grpo: {advantage_clip_low: -2.0, advantage_clip_high: 3.0}", {"advantage_clip_low": -2.0}),
        (
            "grpo: {use_dynamic_sampling: true, reward_shaping: {enabled: true}}",
            {"dynamic_sampling_reward": "raw", "use_dynamic_sampling": True},
        ),
        ("grpo: {val_num_generations_per_prompt: 4}", {"val_num_generations": 4}),
    ],
)
def test_their_advantages_carry_over(text, expected, tmp_path):
    recipe, found = translate(changed(tmp_path, text))
    assert {name: getattr(recipe.grpo, name) for name in expected} == expected
    assert not [finding.key for finding in found if finding.kind in (REFUSED, UNKNOWN)]


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("grpo: {use_dynamic_sampling: true}", "grpo.use_dynamic_sampling", "others"),
        (
            "grpo: {reward_shaping: {enabled: true, max_response_length: 100}}",
            "grpo.reward_shaping.max_response_length",
            "goes on falling",
        ),
    ],
)
def test_a_number_that_will_be_another_is_said_so(text, key, reason, tmp_path):
    found = {finding.key: finding for finding in translate(changed(tmp_path, text))[1]}
    assert found[key].kind == DIFFERS and reason in found[key].note


def test_what_a_file_leaves_out_has_their_default(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text("policy: {model_name: m, train_global_batch_size: 512}\ngrpo: {num_prompts_per_step: 32}\n")
    recipe, found = translate(path)
    assert recipe.grpo.use_leave_one_out_baseline and recipe.grpo.num_generations_per_prompt == 16
    assert (recipe.loss_fn.name, recipe.loss_fn.hyperparameters["dual_clip"]) == ("grpo", None)
    assert (recipe.loss_fn.reference_policy_kl_penalty, recipe.loss_fn.reference_policy_kl_weight) == (0.01, "score")
    notes = {finding.key: finding.note for finding in found}
    assert "not in the file: their default" in notes["grpo.use_leave_one_out_baseline"]
    assert "not in the file" not in notes["grpo.num_prompts_per_step"]


def test_null_takes_a_bound_away_where_it_does_here(tmp_path):
    recipe, _ = translate(changed(tmp_path, "loss_fn: {kl_output_clamp_value: null}"))
    assert recipe.loss_fn.kl_output_clamp_value is None and recipe.loss_fn.kl_input_clamp_value == 20.0


def test_the_command_lists_every_key_and_writes_the_recipe(tmp_path, capsys):
    output = tmp_path / "ours.yaml"
    assert main(["recipe", "check", "--from", "nemo-rl", str(RECIPE), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {key}: " in printed for key in kinds(RECIPE))
    assert load_recipe(output) == translate(RECIPE)[0]


def test_an_interpolation_that_does_not_resolve_is_an_error(tmp_path, capsys):
    path = changed(tmp_path, "grpo: {seed: '${nowhere.at_all}'}")
    assert main(["recipe", "check", "--from", "nemo-rl", str(path)]) == 2
    assert "grpo.seed" in capsys.readouterr().err
