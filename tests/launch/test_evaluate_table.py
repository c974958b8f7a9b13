"""`vespo-megatron eval --table N`: the protocol of a table of the paper, on made-up sets of a few problems."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from wall import needs_wall

from vespo_megatron.cli import main
from vespo_megatron.evaluation.record import read_problems
from vespo_megatron.launch.evaluate import PROBLEMS
from vespo_megatron.launch.evaluate_table import PAPER, table_recipe
from vespo_megatron.recipe.loader import load_recipe

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "examples" / "tiny_moe" / "in_process.yaml")
SUMS = ROOT / "examples" / "tiny_moe" / "build" / "data" / "validation.parquet"
MATHEMATICS = ("aime24", "aime25", "amc23", "math500")
CODE = ("humaneval_plus", "mbpp_plus", "livecodebench_v6")


def write_sets(folder, *names, truth=None):
    """Two problems each, which the example's model can read."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        rows = pyarrow.parquet.read_table(SUMS).slice(2 * number, 2).to_pylist()
        for row in rows:
            row["data_source"] = name
            if truth:
                row["reward_model"]["ground_truth"] = truth
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        status = main(["eval", RECIPE, f"exp_manager.exp_dir={tmp_path / 'runs'}", *arguments])
        return status, capsys.readouterr()

    return run


def test_table_1_is_drawn_as_the_paper_draws_it_and_its_rows_stand_beside_ours(evaluate, tmp_path):
    sets = write_sets(tmp_path / "sets", *MATHEMATICS)
    status, said = evaluate("--table", "1", "--sets", str(sets), "policy.generation.val_top_p=0.7")
    assert status == 0, said.err
    (file,) = tmp_path.rglob(PROBLEMS)
    problems = read_problems(file)
    drawn = Counter((problem.data_source, len(problem.rewards)) for problem in problems)
    assert drawn == {("aime24", 32): 2, ("aime25", 32): 2, ("amc23", 16): 2, ("math500", 4): 2}
    beside = (file.parent / PAPER).read_text()
    assert beside.strip() in said.out
    (ours,) = (line for line in beside.splitlines() if line.startswith("| here: model | vespo | 4 |"))
    means = [
        sum(sum(p.rewards) / len(p.rewards) for p in problems if p.data_source == name) / 2 for name in MATHEMATICS
    ]
    assert f"| {100 * sum(means) / 4:.1f} | {100 * means[0]:.1f}" in ours
    assert "| paper: Qwen3-30B-A3B-Base | vespo | 8 | 70.0 |" in beside
    assert "Drawn with temperature 1, top-p 0.7" in beside and "not known here" in beside
    assert "Not all problems" not in beside


@needs_wall
def test_table_4_runs_programs_and_a_set_that_is_not_there_may_be_left_out(evaluate, tmp_path):
    truth = json.dumps({"inputs": ["1\n"] * 999, "outputs": ["1\n"] * 999})
    sets = write_sets(tmp_path / "sets", *CODE[:2], truth=truth)
    asked = ("--table", "4", "--sets", str(sets), "--partial", "--samples", "11", "grpo.val_greedy=false")
    status, said = evaluate(*asked)
    assert status == 0, said.err
    assert "HumanEval+ pass@10" in said.out and "without LiveCodeBench v6" in said.out
    assert "| here: model | vespo | 4 | 0.0 | 0.0 [0.0, 0.0] | 0.0 [0.0, 0.0] | - |" in said.out
    (file,) = tmp_path.rglob(PROBLEMS)
    written = {problem.ground_truth for problem in read_problems(file)}
    assert written == {f"{truth[:200]}… ({len(truth)} characters)"}, (
        "tests are in the set: here they would be megabytes"
    )


def test_each_set_has_its_reward_and_the_limits_that_its_tests_need(tmp_path):
    sets = write_sets(tmp_path / "sets", *CODE)
    recipe = load_recipe(RECIPE, ["env.reward=code", "env.reward_kwargs={allow_unsafe_code: true}", "env.timeout=5"])
    made = table_recipe(recipe, 4, sets)
    given = made.data.validation.given
    assert [(each.reward, each.num_samples) for each in given.values()] == [("code", 10)] * 3
    assert all(each.reward_kwargs["allow_unsafe_code"] for each in given.values())
    tests = given["livecodebench_v6"].reward_kwargs
    assert tests["max_tests"] > 10_000 and tests["test_timeout"] == 6 and made.env.timeout >= 100 * 6
    made = table_recipe(load_recipe(RECIPE, ["env.timeout=5"]), 2, write_sets(sets, *MATHEMATICS))
    assert {each.reward for each in made.data.validation.given.values()} == {"math"} and made.env.timeout == 5
    assert made.grpo.max_val_samples > 100_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--table", "1"], "data prepare amc23 math500 --output"),
        (["--table", "1"], "or --partial"),
        (["--table", "4", "--partial"], "holds no humaneval_plus.parquet"),
        (["--table", "1", "--data", "x.parquet"], "two choices of sets"),
        (["--partial"], "--partial: is for --table"),
        (["--table", "1", "--partial", "--samples", "math500=4"], "'math500' is no set here"),
        (["--best"], "--best: has no run"),
        (["--best", "--checkpoint", "/no/such/run"], "is no run"),
    ],
)
def test_what_is_wrong_is_one_error(arguments, said, evaluate, tmp_path):
    sets = write_sets(tmp_path / "sets", "aime24", "aime25")
    status, output = evaluate(*arguments, *(["--sets", str(sets)] if "--table" in arguments else []))
    assert status == 2 and said in output.err and not list(tmp_path.rglob(PROBLEMS))


def test_too_few_responses_for_a_pass_at_k_are_refused(evaluate, tmp_path):
    sets = write_sets(tmp_path / "sets", *CODE)
    status, output = evaluate("--table", "4", "--sets", str(sets), "--samples", "mbpp_plus=9")
    assert status == 2 and "9 responses are too few for pass@10 of mbpp_plus" in output.err
