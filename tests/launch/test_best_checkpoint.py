"""The best of a run's checkpoints, by the average of its validation sets or by what its recipe names."""

from __future__ import annotations

from pathlib import Path

import pytest

from vespo_megatron.cli import main
from vespo_megatron.errors import UserError
from vespo_megatron.evaluation.record import metrics
from vespo_megatron.evaluation.scores import Problem
from vespo_megatron.launch.best_checkpoint import best_checkpoint
from vespo_megatron.recipe.loader import save_recipe
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.checkpoint_judgement import Record
from vespo_megatron.run.checkpoint_store import CheckpointStore, RetentionPolicy
from vespo_megatron.run.metrics_file import MetricsFile, read_metrics
from vespo_megatron.run.run_directory import RECIPE_FILE

ROOT = Path(__file__).parents[2]
SPLIT = {"few": "<", "many": ">="}
SCORES = {2: ([1, 0], [0, 0]), 4: ([1, 0], [1, 1]), 6: ([1, 1], [0, 1]), 8: ([0, 0], [0, 0])}
"""Step → rewards of the one problem of `small`, and of each of the three of `large`."""


def problem(source, rewards, number=0):
    n = len(rewards)
    return Problem(f"p{number}", source, "4", tuple(map(float, rewards)), (None,) * n, (7,) * n, ("stop",) * n)


@pytest.fixture
def run(tmp_path):
    """Checkpoints at every second step, evaluated but for the last."""

    def make(**keys):
        values = {f"checkpointing.{name}": value for name, value in keys.items()}
        save_recipe(Recipe().with_values({"policy.model_name": "m", "data.train.path": "t.parquet"} | values), file)
        return tmp_path

    file, store, lines = tmp_path / RECIPE_FILE, CheckpointStore(tmp_path / "checkpoints"), MetricsFile(tmp_path, 0)
    for step, (small, large) in SCORES.items():
        lines.append(
            {"step": step} | metrics([problem("small", small), *(problem("large", large, i) for i in range(3))])
        )
    for step in (*SCORES, 10):
        store.publish(store.begin(step), {})
    lines.append({"step": 10, "reward/mean": 0.5})
    return make


def test_the_average_weighs_every_set_the_same():
    found = metrics([problem("small", [1, 0]), *(problem("large", [1, 1], i) for i in range(3))])
    assert found["eval/average"] == 0.75
    assert metrics([problem("small", [1, 0])])["eval/average"] == 0.5


def test_the_best_by_average_is_taken_and_of_equals_the_newer(run):
    assert best_checkpoint(run()).name == "step_000006", "steps 4 and 6 have the same average"
    assert best_checkpoint(run(metric_name="eval/large/avg@2")).name == "step_000004"
    assert best_checkpoint(run(metric_name="eval/average", higher_is_better=False)).name == "step_000008"


def test_it_is_kept_by_the_same_order(run):
    folder = run()
    store = CheckpointStore(folder / "checkpoints")
    judged = Record(folder, lambda step: step % 2 == 0 and step < 10).judge("eval/average", store.checkpoints())
    store.prune(RetentionPolicy(last=1, top=1), judged)
    assert list(store.checkpoints()) == [10, 6]
    assert best_checkpoint(folder).name == "step_000006"


def test_a_run_without_evaluated_checkpoints_has_no_best_one(run, tmp_path):
    with pytest.raises(UserError, match="has kept 5 checkpoints, and eval/other/avg@2 of none"):
        best_checkpoint(run(metric_name="eval/other/avg@2"))
    with pytest.raises(UserError, match="is no run"):
        best_checkpoint(tmp_path / "checkpoints")


def test_a_run_keeps_its_best_by_the_average_of_its_sets_and_eval_takes_that_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    sums = "examples/tiny_moe/build/data/validation.parquet"
    sets = ", ".join(f"{name}: {{path: {sums}, filter: ['extra_info.index {op} 16']}}" for name, op in SPLIT.items())
    changes = [
        f"exp_manager.exp_dir={tmp_path}",
        "exp_manager.version=one",
        "grpo.max_num_steps=3",
        "grpo.num_prompts_per_step=8",
        "grpo.val_period=1",
        "grpo.val_greedy=false",
        "grpo.val_at_start=false",
        "data.validation.path=null",
        f"data.validation.sets={{{sets}}}",
        "data.group_by=null",
        "checkpointing.save_period=1",
        "checkpointing.keep_top_k=1",
        "checkpointing.metric_name=eval/average",
        "checkpointing.save_hf=false",
        "policy.megatron_cfg.optimizer.lr=3e-3",
        "grpo.val_num_generations=2",
        "grpo.max_val_samples=64",
        "logger.tensorboard_enabled=false",
    ]
    recipe = "examples/tiny_moe/in_process.yaml"
    assert main(["train", recipe, *changes]) == 0
    folder = next(tmp_path.rglob("one"))
    rows = read_metrics(folder)
    for row in rows:
        assert row["eval/average"] == pytest.approx((row["eval/few/avg@2"] + row["eval/many/avg@2"]) / 2)
    best = max(reversed(rows), key=lambda row: row["eval/average"])["step"]
    assert sorted(CheckpointStore(folder / "checkpoints").checkpoints()) == sorted({best, 3})
    capsys.readouterr()
    status = main(["eval", recipe, f"exp_manager.exp_dir={tmp_path}", "--checkpoint", str(folder), "--best"])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert f"checkpoint {folder}/checkpoints/step_{best:06d}" in said.out
