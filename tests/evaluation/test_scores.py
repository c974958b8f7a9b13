"""Scores against enumeration of every subset, and intervals against the theory of proportions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vespo_megatron.evaluation import record
from vespo_megatron.evaluation.scores import Problem, average, majority_at, pass_at, powers_to, score, summary


def problem(rewards, answers=None, name="p0", source="sums"):
    n = len(rewards)
    return Problem(
        name,
        source,
        "4",
        tuple(map(float, rewards)),
        tuple(answers or [None] * n),
        (7,) * n,
        ("stop",) * (n - 1) + ("length",),
    )


@pytest.mark.parametrize("rewards", [[1, 0, 0, 1, 0, 0], [0] * 5, [1] * 5, [0, 0, 0, 1]])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_solution(rewards):
    for k in range(1, len(rewards) + 1):
        subsets = list(itertools.combinations(rewards, k))
        assert pass_at(problem(rewards), k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    assert pass_at(problem(rewards), 1) == pytest.approx(average(problem(rewards)))


def test_more_samples_than_there_are_is_an_error():
    for measure in (pass_at, majority_at):
        with pytest.raises(ValueError, match="of 2 responses"):
            measure(problem([1, 0]), 3)


@pytest.mark.parametrize(
    "answers, rewards, won",
    [
        ("4 4 5", [1, 1, 0], 1.0),
        ("5 4 5", [0, 1, 0], 0.0),
        ("5 4", [0, 1], 0.0),  # a tie: given first
        ("4 5", [1, 0], 1.0),
        ("- - 4", [0, 0, 1], 1.0),  # no answer, no vote
        ("- -", [0, 0], 0.0),
    ],
)
def test_the_majority_answers(answers, rewards, won):
    given = [None if answer == "-" else answer for answer in answers.split()]
    assert majority_at(problem(rewards, given), len(given)) == won


def test_the_majority_of_fewer_is_near_its_mean_over_all_subsets():
    answers = list("4545444556")
    rewards = [float(answer == "4") for answer in answers]
    whole = problem(rewards, answers)
    for k in (1, 3, 5):
        exact = np.mean(
            [
                majority_at(problem([rewards[i] for i in s], [answers[i] for i in s]), k)
                for s in itertools.combinations(range(10), k)
            ]
        )
        assert majority_at(whole, k) == pytest.approx(exact, abs=0.12)
    assert majority_at(whole, 3) == majority_at(whole, 3)


def test_an_interval_covers_as_a_proportion_s_does():
    chance = np.random.default_rng(3)
    covered = 0
    for _ in range(60):
        solved = chance.random(100) < 0.3
        found = score([problem([float(each)], name=f"p{i}") for i, each in enumerate(solved)], average)
        width = 1.96 * math.sqrt(found.value * (1 - found.value) / 100)
        assert found.high - found.low == pytest.approx(2 * width, rel=0.2)
        covered += found.low <= 0.3 <= found.high
    assert covered >= 50


def test_one_problem_has_no_interval_and_equal_ones_have_a_point():
    assert math.isnan(score([problem([1, 0])], average).low)
    assert score([problem([1, 1]), problem([1, 1])], average) == score([problem([1])] * 3, average)


def test_a_summary_has_the_powers_of_two():
    assert powers_to(1) == [1] and powers_to(12) == [1, 2, 4, 8, 12]
    assert list(summary([problem([1, 0, 0, 1], list("4554"))] * 2)) == ["avg@4", "pass@2", "pass@4", "maj@4"]
    assert list(summary([problem([1])])) == ["avg@1"]
    assert "maj@2" not in summary([problem([1, 0])])


def test_problems_read_back_as_they_were_written_and_make_a_table(tmp_path):
    problems = [problem([1, 0], ["4", "ü"], f"p{i}", source) for i, source in enumerate(["aime/24", "sums", "sums"])]
    record.write_problems(problems, tmp_path / "folder" / "problems.jsonl")
    assert record.read_problems(tmp_path / "folder" / "problems.jsonl") == problems
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["problems.jsonl"]
    text = record.table(problems).splitlines()
    assert text[0] == "| set | problems | avg@2 | pass@2 | maj@2 | tokens | truncated |"
    assert text[2] == "| aime/24 | 1 | 50.0 | 100.0 | 100.0 | 7 | 50.0% |"
    assert text[3].startswith("| sums | 2 | 50.0 [50.0, 50.0] | 100.0")
    assert record.metrics(problems)["eval/aime_24/avg@2"] == 0.5
    assert record.metrics(problems)["eval/sums/ci95"] == 0.0
