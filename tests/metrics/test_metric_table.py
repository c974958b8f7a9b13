"""One table says what every metric is and how it merges; code, docs and reports are held to it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vespo_megatron.errors import UserError
from vespo_megatron.metrics.documentation import markdown
from vespo_megatron.metrics.merging import merge, merge_rows
from vespo_megatron.metrics.table import METRICS, Merge, metric
from vespo_megatron.run.metrics_file import read_metrics
from vespo_megatron.run.records import PROGRESS_METRICS, RunLogger
from vespo_megatron.study.panels import PANELS, Panel

ROOT = Path(__file__).parents[2]
AREAS = sorted({name.partition("/")[0] for name in METRICS})


def test_every_row_says_what_it_is():
    for row in METRICS.values():
        assert row.meaning.endswith(".") and row.name.count("/") >= 1, row
        assert row.merge is not Merge.MEAN or row.over or row.name.startswith("rollout/"), f"{row.name}: mean of what?"


def test_the_page_is_what_the_table_says():
    assert (ROOT / "docs" / "metrics.md").read_text() == markdown()


def test_where_log_w_differs_from_the_reference_is_said():
    """recipe/vespo/code/core_algos.py of FloyedShen/VESPO logs seq_log_ratio_clamped, lines 178 to 180."""
    for name in ("mean", "max", "min"):
        assert "unclamped (the reference logs it clamped to ±20)" in METRICS[f"vespo/log_w_{name}"].meaning


def test_every_name_in_the_code_has_a_row():
    """String constants that look like a metric; names with a gap in them are checked when they are logged."""
    looks_like = re.compile(rf"({'|'.join(AREAS)})/[a-z0-9_]+")
    found = {}
    for path in (ROOT / "vespo_megatron").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        pieces = {piece for node in nodes if isinstance(node, ast.JoinedStr) for piece in node.values}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in pieces:
                if looks_like.fullmatch(node.value):
                    found[node.value] = path.name
    assert len(found) > 80
    for name, where in found.items():
        if not name.endswith("_") and name not in ("vespo/w", "vespo/log_w"):  # stems of several
            assert metric(name), where


def test_panels_and_progress_show_metrics_of_the_table_and_no_others():
    assert all(panel.title and panel.caption for panel in PANELS)
    assert all(metric(name) for name, _, _ in PROGRESS_METRICS)
    with pytest.raises(UserError, match=r"nearest is 'loss/policy'"):
        Panel(("loss/polcy",))


@pytest.mark.parametrize("name", ["loss/polcy", "made/up", "reward", "eval/avg@1", "rollout/server_1/size"])
def test_a_metric_that_is_not_in_the_table_cannot_be_logged(name, tmp_path):
    with RunLogger(tmp_path, total_steps=1, tensorboard=False, progress=False) as logger:
        with pytest.raises(UserError, match="is no metric"):
            logger.log_step(1, {"reward/mean": 0.5, name: 1.0})
        with pytest.raises(UserError, match="is no metric"):
            logger.log_step(1, {"reward/mean": 0.5}, histograms={name: [1.0]})
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "reward/format",
        "reward/format/strict",
        "eval/aime24/pass@16",
        "eval/owner/set/avg@4",
        "time/old_log_probs",
        "routes/agreement_layer_47",
    ],
)
def test_families_are_open(name):
    assert "*" in metric(name).name


@pytest.mark.parametrize(
    ("name", "values", "merged"),
    [
        ("advantage/groups", [4.0, 2.0, 2.0], 8.0),
        ("advantage/min", [-0.71, -0.7, -0.71], -0.71),
        ("advantage/max", [0.5, 0.9, 0.7], 0.9),
        ("loss/grad_norm", [1.0, 2.0, 6.0], 3.0),
        ("rollout/servers", [2.0, 1.0, 2.0], 2.0),
        ("time/generate", [1.0, 0.5], 1.5),
        ("memory/train", [1.0, 0.5], 1.0),
    ],
)
def test_values_merge_as_their_row_says(name, values, merged):
    assert merge(name, values) == merged
    assert merge_rows([{name: value} for value in values]) == {name: merged}


def test_a_mean_is_weighted_by_the_parts_sizes_and_a_whole_is_not_merged():
    assert merge("loss/grad_norm", [1.0, 4.0], [3.0, 1.0]) == 1.75
    with pytest.raises(ValueError, match="of the whole"):
        merge("advantage/std", [1.0, 2.0])
    assert merge_rows([{"advantage/std": 1.0, "loss/updates": 1.0}, {"loss/updates": 1.0}]) == {"loss/updates": 2.0}


NUMBERS = st.lists(st.integers(-1000, 1000).map(float), min_size=1, max_size=6)


@given(st.sampled_from(sorted(METRICS)), NUMBERS, NUMBERS)
def test_parts_of_parts_merge_to_the_same(name, first, second):
    if METRICS[name].merge is Merge.WHOLE:
        return
    at_once = merge(name, first + second, [1.0] * (len(first) + len(second)))
    sizes = [float(len(first)), float(len(second))]
    assert merge(name, [merge(name, first), merge(name, second)], sizes) == pytest.approx(at_once, abs=1e-9)
