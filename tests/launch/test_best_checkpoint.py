"""The best of a run's checkpoints, by the average of its validation sets or by what its recipe names."""

from __future__ import annotations

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.evaluation.record import metrics
from vespo_megatron.evaluation.scores import Problem
from vespo_megatron.launch.best_checkpoint import best_checkpoint
from vespo_megatron.recipe.loader import save_recipe
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.checkpoint_judgement import Record
from vespo_megatron.run.checkpoint_store import CheckpointStore, RetentionPolicy
from vespo_megatron.run.metrics_file import MetricsFile
from vespo_megatron.run.run_directory import RECIPE_FILE

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
