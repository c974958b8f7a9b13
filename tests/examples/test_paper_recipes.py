"""Recipes of every table of the paper and of the models beside it: each holds for the real model, and scales down."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from scaled_down import TINY, assert_it_runs

from vespo_megatron.losses import PolicyLossConfig
from vespo_megatron.plan import published
from vespo_megatron.recipe.loader import differences, load_recipe
from vespo_megatron.recipe.rules import validate
from vespo_megatron.recipe.scale_down import scale_down

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
MODELS = {
    "qwen3_30b_a3b/off_policy": "Qwen3-30B-A3B",
    "qwen3_30b_a3b/code": "Qwen3-30B-A3B",
    "qwen3_8b": "Qwen3-8B",
    "llama32_3b": "Llama-3.2-3B",
    "olmoe_1b_7b": "OLMoE-1B-7B",
}
RUNS = [
    path
    for folder in MODELS
    for path in sorted((EXAMPLES / folder).glob("*.yaml"))
    if path.stem not in ("base", "code")
]


def name(path):
    return str(path.relative_to(EXAMPLES).with_suffix(""))


@pytest.fixture
def real(tmp_path):
    """Recipe file → the recipe with the folder of its model, which has the real `config.json` and nothing else."""

    def of(path, *overrides):
        config = published._CONFIGS[MODELS[str(path.parent.relative_to(EXAMPLES))]]
        (tmp_path / "config.json").write_text(json.dumps(config))
        return load_recipe(path, [f"policy.model_name={tmp_path}", *overrides])

    return of


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_every_recipe_holds_for_the_real_model(path, real):
    recipe = real(path)
    validate(recipe)
    PolicyLossConfig.from_recipe(recipe.loss_fn, recipe.behavior)
    assert path.stem in recipe.exp_manager.name and recipe.loss_fn.name == path.stem
    assert recipe.loss_fn.behavior == "recompute"
    if "olmoe" in name(path):
        assert (recipe.world_size, recipe.num_mini_batches) == (4, 4)
    else:
        assert (recipe.world_size, recipe.num_mini_batches) == (32, 8), "N = 8 on 32 GPUs, as in Tables 1, 3 and 4"
        assert recipe.grpo.max_num_steps * 8 >= 1500 and recipe.grpo.normalize_rewards


def test_table_3_has_the_hyperparameters_it_is_compared_with(real):
    found = {path.stem: real(path).loss_fn.hyperparameters for path in RUNS if path.parent.name == "off_policy"}
    assert found["topr"] == {"length_normalized": True}
    assert found["cispo"] == {"ratio_max": 5.0, "ratio_min": 0.0}
    search = PolicyLossConfig.from_recipe(real(EXAMPLES / "qwen3_30b_a3b/off_policy/bapo.yaml").loss_fn, "recompute")
    assert search.hyperparameters == {}, "its repository's are our defaults: tests/losses"


@pytest.mark.parametrize("folder", MODELS)
def test_runs_of_one_table_differ_in_their_objective_alone(folder):
    runs = [load_recipe(path) for path in RUNS if str(path.parent.relative_to(EXAMPLES)) == folder]
    for run in runs[1:]:
        assert {key.split(".")[0] for key in differences(runs[0], run)} <= {"loss_fn", "exp_manager"}


def test_table_4_differs_from_the_run_on_mathematics_in_data_and_reward():
    mathematics = load_recipe(EXAMPLES / "qwen3_30b_a3b/grid/vespo_n8.yaml")
    found = differences(mathematics, load_recipe(EXAMPLES / "qwen3_30b_a3b/code/vespo.yaml"))
    assert {key.split(".")[0] for key in found} == {"data", "env", "exp_manager"}


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_scaled_down_it_is_a_run(path):
    small = scale_down(load_recipe(path), TINY)
    validate(small)
    assert small.cluster.device == "cpu"


def test_the_page_of_the_paper_has_what_plan_says_and_recipes_that_exist():
    spec = importlib.util.spec_from_file_location("plan_paper", ROOT / "benchmarks" / "plan_paper.py")
    rows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rows)
    page = (ROOT / "docs" / "paper.md").read_text()
    for run in rows.RUNS:
        assert rows.row(run) in page, f"python benchmarks/plan_paper.py: {run}"
    for path in RUNS:
        folder, _, _ = name(path).rpartition("/")
        assert f"`{folder}/" in page, path


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", RUNS, ids=name)
def test_every_recipe_runs_scaled_down(path, tmp_path):
    assert_it_runs(path, tmp_path)
