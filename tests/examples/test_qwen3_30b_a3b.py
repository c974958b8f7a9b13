"""The 30B recipes: each loads, holds for the real model's shape, says what the paper says, and scales down whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scaled_down import TINY, assert_it_runs

from vespo_megatron.errors import UserError
from vespo_megatron.losses import PolicyLossConfig
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.recipe.rules import validate
from vespo_megatron.recipe.scale_down import scale_down

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "qwen3_30b_a3b"
RUNS = sorted(path for part in ("grid", "mismatch", "ablations") for path in (FOLDER / part).glob("*.yaml"))
ASYNC = sorted(path for path in (FOLDER / "async").glob("*.yaml") if path.stem != "async")
HARDWARE = sorted((FOLDER / "hardware").glob("*.yaml"))
SHAPE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
}
"""config.json of Qwen/Qwen3-30B-A3B-Base, as far as it is read."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_30b_a3b")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


def name(path):
    return str(path.relative_to(FOLDER).with_suffix(""))


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_every_recipe_holds_for_the_real_model(path, model):
    recipe = load_recipe(path, [f"policy.model_name={model}"])
    validate(recipe)
    PolicyLossConfig.from_recipe(recipe.loss_fn, recipe.behavior)
    assert recipe.exp_manager.name.endswith(path.stem.removeprefix("vespo_")) or path.stem in recipe.exp_manager.name
    assert recipe.loss_fn.behavior == "recompute", "the synchronous scripts leave bypass_mode at false"
    assert recipe.world_size == 32 and recipe.policy.train_global_batch_size == 256 * 8


@pytest.mark.parametrize("hardware", HARDWARE, ids=name)
def test_every_machine_s_layout_holds_with_the_base(hardware, model, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"defaults: [{FOLDER / 'grid' / 'vespo_n8.yaml'}, {hardware}]\n")
    validate(load_recipe(path, [f"policy.model_name={model}"]))


@pytest.mark.parametrize("path", ASYNC, ids=name)
def test_the_asynchronous_runs_are_the_papers_and_keep_their_staleness_scaled_down(path, model):
    recipe = load_recipe(path, [f"policy.model_name={model}"])
    validate(recipe)
    assert (recipe.loss_fn.name, recipe.num_mini_batches, recipe.world_size) == (path.stem, 1, 16)
    assert recipe.loss_fn.behavior == "rollout", "vespo_S_1.0_N_4.sh: async_training.use_rollout_log_probs=True"
    rule = recipe.grpo.async_grpo
    assert (rule.enabled, rule.staleness, rule.sync_every, recipe.slurm.rollout_nodes) == (True, 1.0, 4, 6)
    # The same script: COMMON_TP=4, val_kwargs.n=1, and test_freq=20, counted in weight versions of 4 updates each.
    assert recipe.policy.megatron_cfg.tensor_model_parallel_size == 4
    assert (recipe.grpo.val_num_generations, recipe.grpo.val_period, recipe.checkpointing.save_period) == (1, 80, 80)
    small = scale_down(load_recipe(path), TINY)
    validate(small)
    assert small.grpo.async_grpo == rule and small.num_mini_batches == 1
    megatron = small.policy.megatron_cfg
    assert megatron.tensor_model_parallel_size == 2, "the tiny model has 2 key/value heads"
    assert (megatron.expert_model_parallel_size, megatron.sequence_parallel, small.world_size) == (8, True, 8)


def test_the_grid_is_the_papers():
    assert {path.stem for path in (FOLDER / "grid").glob("*.yaml")} == {
        f"{objective}_n{n}" for objective in ("vespo", "grpo", "gspo", "sapo") for n in (4, 8, 16, 32, 64)
    }
    for path in (FOLDER / "grid").glob("*.yaml"):
        objective, _, n = path.stem.partition("_n")
        recipe = load_recipe(path)
        assert (recipe.loss_fn.name, recipe.num_mini_batches) == (objective, int(n))
        updates = recipe.grpo.max_num_steps * recipe.num_mini_batches
        assert 1500 <= updates < 1500 + int(n)


def test_runs_of_one_study_differ_in_what_they_study_alone():
    from vespo_megatron.recipe.loader import differences

    base = load_recipe(FOLDER / "mismatch" / "grpo.yaml")
    changed = {
        path.stem: set(differences(base, load_recipe(path))) - {"exp_manager.name"}
        for path in (FOLDER / "mismatch").glob("grpo*.yaml")
    }
    assert changed == {
        "grpo": set(),
        "grpo_tis": {"loss_fn.correction"},
        "grpo_r2": {"policy.router_replay.mode"},
        "grpo_r3": {"policy.router_replay.mode", "policy.generation.sglang_cfg.enable_return_routed_experts"},
    }


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_scaled_down_a_recipe_keeps_its_layout_objective_and_staleness(path):
    big = load_recipe(path)
    small = scale_down(big, TINY)
    validate(small)
    for key in ("tensor", "pipeline", "expert_model", "expert_tensor"):
        attribute = {"tensor": "tensor_model", "pipeline": "pipeline_model"}.get(key, key) + "_parallel_size"
        assert getattr(small.policy.megatron_cfg, attribute) == getattr(big.policy.megatron_cfg, attribute)
    assert small.loss_fn == big.loss_fn and small.policy.router_replay == big.policy.router_replay
    assert small.num_mini_batches == big.num_mini_batches
    assert small.cluster.device == "cpu" and small.world_size == 8
    assert big.cluster.device == "cuda", "the recipe that was given is not changed"


def test_a_layout_too_large_for_one_machine_and_a_missing_model_are_refused(tmp_path):
    recipe = load_recipe(RUNS[0], ["policy.megatron_cfg.expert_model_parallel_size=32"])
    with pytest.raises(UserError, match="needs 32 processes"):
        scale_down(recipe, TINY)
    with pytest.raises(UserError, match="prepare.py"):
        scale_down(recipe, tmp_path)


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", [*RUNS, *ASYNC], ids=name)
def test_every_recipe_runs_scaled_down(path, tmp_path):
    assert_it_runs(path, tmp_path)
