"""docs/losses.md says what the code does."""

import re
from pathlib import Path

import pytest

from tests.losses.batches import make_batch
from tests.losses.test_surrogates import run
from vespo_megatron.losses import get_objective, objective_names
from vespo_megatron.losses.advantage_estimators import ESTIMATORS
from vespo_megatron.losses.correction.config import DEFAULT_BOUNDS
from vespo_megatron.metrics.table import Merge, metric

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "losses.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/losses.md"])
def test_the_examples_run_as_they_stand(page):
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        exec(example, {"__name__": "example"})


def test_every_objective_is_documented_with_its_defaults_and_source():
    rows = {m.group(1): m.group(0) for m in re.finditer(r"^\| `(\w+)` \|.*$", TEXT, re.MULTILINE)}
    for name in objective_names():
        objective = get_objective(name)
        for key, value in objective.hyperparameters.items():
            assert f"{key} {value}" in rows[name]
        assert objective.source in rows[name] and objective.aggregation in rows[name]
    assert all(f"`{name}`" in TEXT for name in [*ESTIMATORS, *DEFAULT_BOUNDS])


def test_every_metric_of_a_loss_has_a_row_in_the_table():
    for name in ("vespo", "grpo"):
        for found in run(make_batch(4), name)[0].metrics.finalize():
            assert metric(found).meaning


def test_a_loss_adds_up_each_metric_as_the_table_says():
    """`MetricSums` keeps sums, largest and smallest values apart; the table says which a metric is."""
    for name in ("vespo", "grpo"):
        parts = run(make_batch(4), name)[0].metrics
        held = ((parts.sums, (Merge.MEAN, Merge.SUM)), (parts.maxima, (Merge.MAX,)), (parts.minima, (Merge.MIN,)))
        for values, rules in held:
            public = [found for found in values if not found.startswith("_")]
            assert public
            assert all(metric(found).merge in rules for found in public)
