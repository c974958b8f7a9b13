"""A value for each variant, chosen on seeds that the study does not use; cells that have fewer seeds than others."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_study import SMALL, made_up

from vespo_megatron.cli.command_line import main
from vespo_megatron.errors import UserError
from vespo_megatron.study import compare as compare_module
from vespo_megatron.study.comparison import compare_primary, compare_rows
from vespo_megatron.study.outcomes import read_outcomes
from vespo_megatron.study.spec import load_study
from vespo_megatron.study.study_report import sentences
from vespo_megatron.study.tuning import choices, tuned, tuning_study

ROOT = Path(__file__).parents[2]
TUNE = """
baselines: {broken: again}
tune:
  key: policy.megatron_cfg.optimizer.lr
  values: [1.0e-4, 2.0e-4, 4.0e-4]
  seeds: [7, 8]
"""
BEST = {"vespo": 2e-4, "again": 4e-4}


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.format(base=ROOT / "examples/tiny_moe/in_process.yaml", output=tmp_path / "runs") + TUNE)
    return path


def score(cell, steps):
    rate = float(cell.levels[1].partition("=")[2])
    return [0.9 - 100 * abs(rate - BEST[cell.levels[0]]) + 0.001 * cell.seed] * steps


def test_each_variant_has_the_best_value_of_other_seeds_and_a_remedy_its_objectives(study_file):
    study = load_study(study_file)
    tuning = tuning_study(study, study.tuning)
    assert [cell.name for cell in tuning.cells()][:3] == [f"vespo/lr={v}/seed_7" for v in (0.0001, 0.0002, 0.0004)]
    assert {cell.seed for cell in tuning.cells()}.isdisjoint(study.seeds) and len(tuning.cells()) == 2 * 3 * 2
    assert choices(read_outcomes(tuning)) is None, "none has been run"
    made_up(tuning, score)
    chosen = choices(read_outcomes(tuning))
    assert {choice.variant: (choice.value, choice.at_an_end) for choice in chosen} == {
        "vespo": ("lr=0.0002", False),
        "again": ("lr=0.0004", True),
    }
    rates = {
        cell.levels[0]: study_recipe.policy.megatron_cfg.optimizer.lr
        for cell in tuned(study, study.tuning, chosen).cells()
        for study_recipe in [study.recipe(cell)]
    }
    assert rates == {"vespo": 2e-4, "again": 4e-4, "broken": 4e-4}


def test_the_command_chooses_first_and_the_report_says_what(study_file, monkeypatch, capsys):
    begun = []

    def run_all(study, waiting, parallel):
        begun.append(study.name)
        made_up(study, score if len(study.axes) == 2 else lambda cell, steps: [0.5 + 0.01 * cell.seed] * steps)
        return {}

    monkeypatch.setattr(compare_module, "_run_all", run_all)
    monkeypatch.setattr(compare_module, "check_tables", lambda recipe: None)
    assert main(["compare", str(study_file)]) == 0
    assert begun == ["small, tuning", "small"]
    assert "again: lr=0.0004, an end of what was tried" in capsys.readouterr().out
    study = load_study(study_file)
    for file in ("tables.md", "report.html"):
        assert "vespo: lr=0.0002 (lr=0.0001: 0.8" in (study.output / file).read_text()


def test_a_tuning_run_that_failed_begins_no_study(study_file, monkeypatch, capsys):
    failing = {"small, tuning": True}

    def run_all(study, waiting, parallel):
        assert failing.pop(study.name, False), "the study began"
        return {waiting[0]: "it was full"}

    monkeypatch.setattr(compare_module, "_run_all", run_all)
    monkeypatch.setattr(compare_module, "check_tables", lambda recipe: None)
    assert main(["compare", str(study_file)]) == 1
    assert "vespo/lr=0.0001/seed_7 failed: it was full" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, said",
    [
        ("seeds: [7, 8]|seeds: [1, 8]", "tune.seeds"),
        ("values: [1.0e-4, 2.0e-4, 4.0e-4]|values: [1.0e-4]", "tune.values"),
        ("  seeds: [7, 8]|  at: [N=4]\n  seeds: [7, 8]", "tune.at"),
        ("  key: policy|  keys: policy", "tune"),
        ("baselines:|exploratory_seeds: [3]\nbaselines:", "exploratory_seeds"),
    ],
)
def test_what_is_wrong_is_named(change, said, study_file):
    old, new = change.split("|")
    study_file.write_text(study_file.read_text().replace(old, new))
    with pytest.raises(UserError, match=said):
        load_study(study_file)


def test_what_is_explored_may_have_fewer_seeds_than_what_was_stated(study_file):
    text = study_file.read_text().replace("[1, 2]", "[1, 2, 3, 4]").replace("{broken: again}", "{}")
    study_file.write_text(text + "primary: [again > vespo]\nexploratory_seeds: [2, 3]\n")
    study = load_study(study_file)
    seeds = {name: [cell.seed for cell in study.cells() if cell.levels == (name,)] for name in study.variants}
    assert seeds == {"vespo": [1, 2, 3, 4], "again": [1, 2, 3, 4], "broken": [2, 3]}
    made_up(
        study, lambda cell, steps: [{"vespo": 0.1, "again": 0.2, "broken": 0.4}[cell.levels[0]] * cell.seed] * steps
    )
    outcomes = read_outcomes(study)
    (stated,) = compare_primary(study, outcomes)
    assert stated.difference.mean.count == 4
    (explored,) = [row.differences["accuracy"] for row in compare_rows(study, outcomes) if row.variant == "broken"]
    assert explored.mean.count == 2 and explored.mean.value == pytest.approx(0.3 * 2.5), "paired by seed"
    part = study.with_seeds([1])
    rows = compare_rows(part, read_outcomes(part))
    assert {row.variant: len(row.runs) for row in rows}["broken"] == 0
    assert sentences(rows) == [], "nothing is said of what was not run"
