"""The paper's tables: its averages, typed off a second time, and its protocol; ours beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vespo_megatron.cli import build_parser
from vespo_megatron.data.public.sets import SETS
from vespo_megatron.evaluation.beside_paper import Evaluated, beside_paper, measured
from vespo_megatron.evaluation.paper import SOURCE, TABLES, Benchmark
from vespo_megatron.evaluation.scores import Problem
from vespo_megatron.losses import objective_names

ROOT = Path(__file__).parents[2]
AVERAGES = """
1 Llama-3.2-3B-Instruct 8: grpo 26.8, gspo 26.7, sapo 24.5, vespo 28.3
1 Qwen3-8B-Base 8: grpo 54.6, gspo 56.4, sapo 60.9, vespo 60.9
1 Qwen3-30B-A3B-Base 8: grpo 57.0, gspo 59.1, sapo 51.7, vespo 70.0
2 Qwen3-30B-A3B-Base 4: vespo 70.0, grpo 54.0, gspo 59.9, sapo 65.2
2 Qwen3-30B-A3B-Base 8: vespo 70.0, grpo 57.0, gspo 59.1, sapo 51.7
2 Qwen3-30B-A3B-Base 16: vespo 67.3, grpo 51.1, gspo 58.3, sapo 50.5
2 Qwen3-30B-A3B-Base 32: vespo 64.5, grpo 52.4, gspo 50.0, sapo 20.9
2 Qwen3-30B-A3B-Base 64: vespo 61.8, grpo 48.6, gspo 47.6, sapo 16.5
3 Qwen3-30B-A3B-Base 8: topr 48.7, cispo 48.7, bapo 63.6
4 Qwen3-30B-A3B-Base None: grpo 60.9, gspo 59.7, sapo 61.8, vespo 63.0
"""


def problem(source, rewards, number=0):
    n = len(rewards)
    return Problem(f"p{number}", source, "4", tuple(map(float, rewards)), (None,) * n, (7,) * n, ("stop",) * n)


def test_the_averages_are_the_paper_s():
    expected = set()
    for line in AVERAGES.strip().splitlines():
        where, _, cells = line.partition(": ")
        table, model, updates = where.split()
        for cell in cells.split(", "):
            objective, value = cell.split()
            expected.add((int(table), model, objective, updates, float(value)))
    found = {
        (number, row.model, row.objective, str(row.updates), row.average)
        for number, table in TABLES.items()
        for row in table.rows
    }
    assert found == expected


def test_the_protocol_is_the_paper_s_and_every_name_is_one_of_ours():
    mathematics = "aime24 avg@32, aime25 avg@32, amc23 avg@16, math500 avg@4"
    code = "humaneval_plus pass@10, mbpp_plus pass@10, livecodebench_v6 pass@10"
    for number, table in TABLES.items():
        assert ", ".join(f"{each.name} {each.measure}" for each in table.benchmarks) == (
            code if number == 4 else mathematics
        )
        assert {each.name for each in table.benchmarks} <= set(SETS)
        assert {row.objective for row in table.rows} <= set(objective_names())
        assert build_parser().parse_args(["eval", "--table", str(number), "recipe.yaml"]).table == number


def test_of_more_responses_pass_at_ten_is_of_every_ten_of_them_and_of_fewer_it_is_called_what_it_is():
    ten = Benchmark("a", "A", 10, pass_at=10)
    measure, value = measured([problem("a", [1] + [0] * 19)], ten)
    assert measure == "pass@10" and value.value == pytest.approx(0.5)
    assert measured([problem("a", [1, 0, 0])], ten)[0] == "pass@3"
    assert measured([problem("a", [1, 0, 0, 0])], Benchmark("a", "A", 4))[1].value == 0.25


def cells(text, first):
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_ours_stands_beside_every_row_and_the_recipe_s_own_are_bold():
    problems = [
        *(problem("aime24", [1, 0] * 16, number) for number in range(2)),
        problem("aime25", [0] * 32),
        problem("amc23", [1] * 16),
        problem("math500", [1, 1, 0, 0]),
    ]
    what = Evaluated("step_000100", "gspo", 16)
    text = beside_paper(2, problems, dict.fromkeys(("aime24", "aime25", "amc23", "math500"), 1) | {"aime24": 2}, what)
    assert "Not all problems" not in text and "Table 2 of arXiv 2602.10693 v3" in text
    ours = cells(text, "here: step_000100")
    assert ours[1:] == ["gspo", "16", "50.0", "50.0 [50.0, 50.0]", "0.0", "100.0", "50.0"]
    assert text.count("paper: Qwen3-30B-A3B-Base") == 20
    assert [line for line in text.splitlines() if "**" in line] == [
        "| paper: Qwen3-30B-A3B-Base | gspo | 16 | **58.3** |  |  |  |  |"
    ]
    assert cells(text, "")[3:] == ["average", "AIME24 avg@32", "AIME25 avg@32", "AMC23 avg@16", "MATH-500 avg@4"]
    assert "without" not in text and "Another number" not in text


def test_what_is_missing_or_other_than_in_the_paper_is_said():
    problems = [problem("humaneval_plus", [1] * 10), problem("livecodebench_v6", [1, 0, 0])]
    text = beside_paper(4, problems, {"humaneval_plus": 1, "livecodebench_v6": 175}, Evaluated("m", "vespo", 8))
    assert cells(text, "here: m")[3:] == ["100.0", "100.0", "-", "100.0 (pass@3)"]
    assert "without MBPP+" in text and "Another number of responses than the paper's on LiveCodeBench v6" in text
    assert "Not all problems: 1 of 175 of livecodebench_v6;" in text
    assert "**63.0**" in text, "Table 4 has no N"


def test_what_a_study_shows_as_published_is_what_the_table_has():
    published = yaml.safe_load((ROOT / "examples" / "studies" / "staleness.yaml").read_text())["published"]
    assert published["source"].startswith(f"{SOURCE}, Table 2: Qwen3-30B-A3B-Base")
    found = {(row.objective, f"N={row.updates}"): row.average for row in TABLES[2].rows}
    shown = {(objective, setting): v for objective, row in published["values"].items() for setting, v in row.items()}
    assert shown == found
