"""A study from its file to its report: checked before it runs, resumed where it was, and read in a minute."""

from __future__ import annotations

import ast
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_up_study import SMALL, made_up
from scipy.stats import ttest_1samp

from vespo_megatron.errors import UserError
from vespo_megatron.launch.preflight import check_tables
from vespo_megatron.recipe.loader import save_recipe
from vespo_megatron.recipe.rules import problems
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.host_threads import core_shares
from vespo_megatron.study import compare as compare_module
from vespo_megatron.study.compare import environment
from vespo_megatron.study.comparison import compare_primary, compare_rows
from vespo_megatron.study.outcomes import read_outcomes
from vespo_megatron.study.run_process import CommandRun, RunForker, end, stop
from vespo_megatron.study.spec import load_study
from vespo_megatron.study.study_report import sentences, write_study_report

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "examples" / "studies").glob("*.yaml"))


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.format(base=ROOT / "examples/tiny_moe/in_process.yaml", output=tmp_path / "runs"))
    return path


@pytest.mark.parametrize("path", [path for path in STUDIES if path.name != "long.yaml"], ids=lambda path: path.stem)
def test_every_study_of_the_examples_is_sound(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    updates = set()
    for cell in study.cells():
        if cell.seed != study.seeds[0]:
            continue
        recipe = study.recipe(cell)
        assert list(problems(recipe)) == [], cell.name
        check_tables(recipe)
        assert recipe.grpo.seed == cell.seed
        updates.add(recipe.num_mini_batches * recipe.grpo.max_num_steps)
        if study.name == "staleness":
            assert cell.levels[1] == f"N={recipe.num_mini_batches}"
    assert len({cell.name for cell in study.cells()}) == len(study.cells())
    assert len(updates) == 1, "runs of one study make as many updates"


@pytest.mark.parametrize(
    "change, said",
    [
        ("seeds: [1, 2]|seeds: [1, 1]", "seeds"),
        ("accuracy: eval/running_sums/avg@1|accuracy: 3", "accuracy"),
        ("parallel: 2|paralel: 2", "paralel"),
        ("parallel: 2|baseline: grpo", "baseline"),
        ("  vespo: [loss|  ves/po: [loss", "variants"),
        ("  again: [loss_fn.name=vespo]|  again: [loss_fn.name]", "variants.variant.again"),
        ("variants:|", "small.yaml"),
        ("parallel: 2|also: [k4]", "small.yaml: also"),
        ("parallel: 2|baselines: {again: grpo}", "small.yaml: baselines"),
        ("parallel: 2|primary: [again beats vespo]", "small.yaml: primary"),
        ("parallel: 2|primary: [grpo > vespo]", "small.yaml: primary"),
        ("parallel: 2|primary: [vespo > vespo]", "small.yaml: primary"),
        ("parallel: 2|primary: [again > vespo at N=4]", "small.yaml: primary"),
        ("parallel: 2|primary: [again > vespo, again > vespo]", "small.yaml: primary"),
    ],
)
def test_what_is_wrong_with_a_study_is_named(change, said, study_file):
    old, new = change.split("|")
    study_file.write_text(study_file.read_text().replace(old, new))
    with pytest.raises(UserError, match=said):
        load_study(study_file)


def test_a_recipe_that_is_wrong_stops_the_study_before_anything_runs(study_file, monkeypatch):
    study_file.write_text(study_file.read_text().replace("name=vespo]\n  broken", "name=wespo]\n  broken"))
    monkeypatch.setattr(compare_module, "_run_all", lambda *a: pytest.fail("it was started"))
    with pytest.raises(UserError, match="again/seed_1: loss_fn.name"):
        compare_module.compare(load_study(study_file))


@pytest.mark.parametrize("processes, alone", [(1, True), (2, False)])
def test_a_run_of_one_process_starts_no_agent(processes, alone, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    recipe = Recipe().with_values({"cluster.gpus_per_node": processes})
    told = environment(recipe, cores=4)
    # The launcher counts the cores it has been given by itself.
    assert told.get("OMP_NUM_THREADS") == ("4" if alone else None) and ("RANK" in told) is alone


class ShortRun(CommandRun):
    """Writes down the cores it has."""

    def __init__(self, file):
        code = "import os, time, sys; time.sleep(0.5); open(sys.argv[1], 'w').write(str(os.sched_getaffinity(0)))"
        self._process = subprocess.Popen([sys.executable, "-c", code, str(file)])
        self.pid = self._process.pid


def test_runs_beside_each_other_share_no_core(study_file, tmp_path, monkeypatch):
    study = load_study(study_file)
    files = [tmp_path / f"cores_{number}" for number in range(4)]
    runs = iter(files)
    monkeypatch.setattr(compare_module._Starter, "start", lambda self, cell: ShortRun(next(runs)))
    assert compare_module._run_all(study, study.cells()[:4], parallel=2) == {}
    shares = [tuple(sorted(share)) for share in core_shares(2)]
    told = [tuple(sorted(ast.literal_eval(file.read_text()))) for file in files]
    assert set(told[:2]) == set(told) == set(shares)


@pytest.mark.slow
def test_a_failed_variant_takes_no_other_down_and_the_same_command_goes_on(study_file, tmp_path):
    def command():
        return subprocess.run(
            [sys.executable, "-m", "vespo_megatron.cli", "compare", str(study_file)],
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=170,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    shutil.copy(study_file, tmp_path / "copy.yaml")
    text = study_file.read_text()
    study_file.write_text(text.replace("seeds: [1, 2]", "seeds: [1]"))
    first = command()
    assert first.returncode == 1, first.stderr
    assert "broken/seed_1 failed" in first.stderr and "/no/such/prompts.parquet" in first.stderr
    states = {o.cell.name: o.state for o in read_outcomes(load_study(study_file))}
    assert states["vespo/seed_1"] == states["again/seed_1"] == "finished"
    finished = (tmp_path / "runs/vespo/seed_1/summary.json").stat().st_mtime_ns

    study_file.write_text(text[: text.index("  broken")] + text[text.index("accuracy") :])
    second = command()
    assert second.returncode == 0, second.stderr
    assert "4 runs, 2 finished before" in second.stdout
    assert (tmp_path / "runs/vespo/seed_1/summary.json").stat().st_mtime_ns == finished
    study = load_study(study_file)
    rows = compare_rows(study, read_outcomes(study))
    assert rows[1].differences["accuracy"].verdict == "no difference found"  # the null study: the same variant twice
    assert learnt(study.folder(study.cells()[0])) == learnt(study.folder(study.cells()[1])), "forked runs differ"
    assert "report.html" in second.stdout
    with (tmp_path / "runs/cells.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert [(cell["variant"], cell["seed"]) for cell in cells] == [
        ("vespo", "1"),
        ("again", "1"),
        ("vespo", "2"),
        ("again", "2"),
    ]
    study_file.write_text(text.replace("max_num_steps=2", "max_num_steps=3"))
    third = command()
    assert third.returncode == 2 and "grpo.max_num_steps: 2 → 3" in third.stderr


def learnt(run_dir):
    """Metrics of every step but those of the machine."""
    machine = ("wall_time", "time/", "memory/", "throughput/", "checkpoint/")
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(machine)}
        for line in (run_dir / "metrics.jsonl").open()
    ]


def named(recipe, name):
    return recipe.with_values({"exp_manager.name": name})


def test_a_forked_run_learns_what_the_command_does_and_is_ended_with_what_it_started(study_file, tmp_path):
    study = load_study(study_file)
    cell = study.cells()[0]
    forked, alone = tmp_path / "forked.yaml", tmp_path / "alone.yaml"
    for file in (forked, alone):
        save_recipe(named(study.recipe(cell), file.stem), file)
    variables = environment(study.recipe(cell), cores=1)
    forker = RunForker(variables)
    runs = [forker.start(forked, forked.with_suffix(".log")), CommandRun(alone, alone.with_suffix(".log"), variables)]
    for run, file in zip(runs, (forked, alone), strict=True):
        assert run.wait(120) and run.poll() == 0, file.with_suffix(".log").read_text()
    forked_run, alone_run = (study.output / file.stem / "seed_1" for file in (forked, alone))
    assert learnt(forked_run) == learnt(alone_run)
    assert "$ vespo-megatron train" in forked.with_suffix(".log").read_text()

    save_recipe(named(study.recipe(cell, ("grpo.max_num_steps=100000",)), "long"), forked)
    long = forker.start(forked, forked.with_suffix(".log"))
    deadline = time.monotonic() + 60
    while not (study.output / "long/seed_1/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    stop(long)
    end(long, 60)
    assert long.poll() == 143, forked.with_suffix(".log").read_text()


# ---- reports of made-up runs ---------------------------------------------------------------------------------------


def test_a_report_says_which_variant_helped_by_how_much_and_whether_it_is_noise(study_file, tmp_path):
    text = study_file.read_text().replace("seeds: [1, 2]", "seeds: [1, 2, 3, 4, 5]")
    study_file.write_text(text + "published: {source: a paper, values: {vespo: 70.0}}\n")
    study = load_study(study_file)

    def accuracy(cell, steps):
        noise = 0.01 * ((cell.seed * 7) % 5)
        other = 0.01 * ((cell.seed * 3) % 5) - noise
        end = {"vespo": 0.5, "again": 0.502 + other, "broken": 0.9 + other}[cell.levels[0]]
        return [0.3 + (end + noise - 0.3) * step / (steps - 1) for step in range(steps)]

    made_up(study, accuracy)
    said = sentences(compare_rows(study, read_outcomes(study)))
    assert said[0].startswith("broken against vespo: higher (+0.400 accuracy")
    assert "again against vespo: no difference found" in said[1]
    page = write_study_report(study).read_text()
    assert all(sentence.split(" (")[0] in page for sentence in said)
    assert "70.0" in page and "a paper" in page
    assert (tmp_path / "runs/tables.md").read_text().count("| vespo |") >= 2
    assert min(path.name for path in (tmp_path / "runs/figures").iterdir()) == "effective_sample_size.png"


def test_a_collapsed_run_is_flagged_and_a_running_one_is_not_counted(study_file):
    study = load_study(study_file)
    made_up(
        study,
        lambda cell, steps: [0.3, 0.8, 0.9, 0.1 if cell.levels[0] == "again" else 0.9],
        unfinished=[("broken",)],
    )
    rows = {row.variant: row for row in compare_rows(study, read_outcomes(study))}
    assert (rows["vespo"].collapsed, rows["again"].collapsed) == (0, 2)
    assert rows["broken"].finished == 0 and rows["broken"].accuracy.text() == "-"
    assert "again" in write_study_report(study).read_text()


def test_other_measures_are_compared_as_ratios_or_differences(study_file):
    study_file.write_text(study_file.read_text().replace("[1, 2]", "[1, 2, 3, 4]") + "also: [k3, ess]\n")
    study = load_study(study_file)
    made_up(study, lambda cell, steps: [0.5] * steps)
    for cell in study.cells():
        path = study.folder(cell) / "metrics.jsonl"
        factor = {"vespo": 1.0, "again": 1.0 + 0.1 * (cell.seed % 2), "broken": 0.2 + 1e-4 * cell.seed}
        k3 = factor[cell.levels[0]] * cell.seed * 1e-4
        rows = [json.loads(line) | {"mismatch/k3": k3 * (1 + 0.01 * cell.seed)} for line in path.open()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = sentences(compare_rows(study, read_outcomes(study)))
    assert said[0].startswith("again against vespo: no difference found (+0.000 accuracy")
    (k3,) = [text for text in said if "broken" in text and "k3" in text]
    assert k3.startswith("broken against vespo: lower (×0.2 k3 [×0.2, ×0.2]")
    assert any("again" in text and "no difference found (×" in text for text in said)
    assert any(text.startswith("again against vespo: no difference found (+0.000 ess") for text in said)


def test_a_variant_can_have_a_baseline_of_its_own(study_file):
    study_file.write_text(study_file.read_text() + "baselines: {broken: again}\n")
    study = load_study(study_file)
    ends = {"vespo": 0.3, "again": 0.5, "broken": 0.6}
    made_up(study, lambda cell, steps: [ends[cell.levels[0]] + 0.01 * cell.seed] * steps)
    said = sentences(compare_rows(study, read_outcomes(study)))
    assert [text.split(" [")[0] for text in said] == [
        "again against vespo: no difference found (+0.200 accuracy",
        "broken against again: no difference found (+0.100 accuracy",
    ]


def test_what_was_stated_before_is_corrected_by_itself_and_said_first(study_file):
    text = study_file.read_text().replace("seeds: [1, 2]", "seeds: [1, 2, 3, 4, 5]")
    study_file.write_text(text + "primary: [again > vespo, again vs broken]\n")
    study = load_study(study_file)
    shift = {"vespo": 0.0, "again": 0.02, "broken": 0.05}
    made_up(study, lambda cell, steps: [0.3 + shift[cell.levels[0]] * (1 + 0.3 * (cell.seed % 3))] * steps)
    outcomes = read_outcomes(study)
    stated, rows = compare_primary(study, outcomes), compare_rows(study, outcomes)
    assert [each.outcome for each in stated] == ["higher, as expected", "lower"]
    accuracies = [{run.cell.seed: run.accuracy for run in row.runs} for row in rows]
    by_hand = sorted(
        ttest_1samp([left[seed] - right[seed] for seed in study.seeds], 0.0).pvalue
        for left, right in ((accuracies[1], accuracies[0]), (accuracies[1], accuracies[2]))
    )
    assert sorted(each.difference.adjusted_p for each in stated) == pytest.approx(
        [2 * by_hand[0], max(2 * by_hand[0], by_hand[1])]
    )
    (explored,) = sentences(rows)
    assert explored.startswith("broken against vespo") and rows[2].differences["accuracy"].adjusted_p == pytest.approx(
        rows[2].differences["accuracy"].p
    ), "corrected for nothing else"
    page = write_study_report(study).read_text()
    assert page.index("again against vespo: higher, as expected") < page.index("Exploratory comparisons")
    assert "Stated before it was run:\n\n- again against vespo: higher" in (study.output / "tables.md").read_text()


def test_part_of_a_study_is_some_of_its_seeds(study_file):
    study = load_study(study_file)
    assert {cell.seed for cell in study.with_seeds([2]).cells()} == {2}
    for seeds in ([], [1, 3]):
        with pytest.raises(UserError, match="no seeds"):
            study.with_seeds(seeds)
    assert study.with_seeds([2]).folder(study.cells()[0]) == study.folder(study.cells()[0]), "they go on with the rest"


def test_every_setting_shows_every_panel_and_the_raw_curves_are_kept(study_file, tmp_path):
    text = study_file.read_text()
    axes = "axes:\n  objective: {vespo: [], grpo: []}\n  staleness: {N=4: [], N=8: []}\n"
    study_file.write_text(text[: text.index("variants:")] + axes + text[text.index("accuracy:") :])
    study = load_study(study_file)
    made_up(study, lambda cell, steps: [0.1 * step for step in range(steps)])
    page = write_study_report(study).read_text()
    names = {path.stem for path in (tmp_path / "runs/figures").iterdir()}
    panels = ("held-out_accuracy", "reward", "effective_sample_size")
    assert names == {"accuracy"} | {f"{panel}_{setting}" for panel in panels for setting in ("N=4", "N=8")}
    assert page.count("<figure>") == 7 and "<h2>At N=8</h2>" in page
    with (tmp_path / "runs/curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == 2 * 2 * 2 * 4
    assert curves[3]["step"] == "3" and float(curves[3]["reward"]) == pytest.approx(0.3) and curves[3]["k3"] == ""
