"""The real nemo-toolkit: its own `ExpManagerConfig` takes our section, its own `hydra_runner` runs our recipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.recipe.schema import ExpManagerConfig
from vespo_megatron.run.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "tiny_moe").glob("*.yaml"))
pytestmark = [pytest.mark.nemo, pytest.mark.timeout(600)]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "vespo_megatron.nemo_entry", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_this_is_the_real_toolkit():
    from importlib.metadata import version

    assert version("nemo-toolkit") == "3.0.0"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_nemo_s_own_exp_manager_takes_ours(path):
    from vespo_megatron.nemo_entry import check_exp_manager

    check_exp_manager(load_recipe(path))


def test_what_nemo_would_not_take_is_named():
    from vespo_megatron.nemo_entry import check_exp_manager

    exp_manager = ExpManagerConfig().model_copy(update={"resume_if_exists": "perhaps"})
    recipe = load_recipe(RECIPES[0]).model_copy(update={"exp_manager": exp_manager})
    with pytest.raises(UserError, match="exp_manager: .*perhaps"):
        check_exp_manager(recipe)


def test_a_recipe_with_defaults_runs_under_hydra_with_hydra_s_overrides(tmp_path):
    done = command(
        "--config-path=examples/tiny_moe",
        "--config-name=in_process",
        "grpo.max_num_steps=2",
        "grpo.num_prompts_per_step=8",
        "grpo.val_period=0",
        "+loss_fn.hyperparameters.c1_pos=2.5",
        "logger.tensorboard_enabled=false",
        f"exp_manager.exp_dir={tmp_path}",
        "exp_manager.version=one",
    )
    assert done.returncode == 0, done.stderr
    run_dir = next(tmp_path.rglob("one"))
    assert [row["step"] for row in read_metrics(run_dir) if row["step"]] == [1, 2]
    assert load_recipe(run_dir / "recipe.yaml").loss_fn.hyperparameters == {"c1_pos": 2.5}


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (["grpo.max_num_stepss=2"], 1, "max_num_stepss"),
        (["grpo.max_num_steps=many"], 2, "grpo.max_num_steps"),
        (["grpo.max_num_steps=-1"], 2, "grpo.max_num_steps"),
    ],
)
def test_bad_overrides_are_named(arguments, status, said):
    done = command("--config-path=examples/tiny_moe", "--config-name=in_process", *arguments)
    assert done.returncode == status and said in done.stderr, done.stderr


def test_no_such_recipe_is_named():
    done = command("--config-path=examples/tiny_moe", "--config-name=nothing")
    assert done.returncode == 2 and "there is no recipe" in done.stderr
