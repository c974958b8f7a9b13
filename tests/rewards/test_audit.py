"""Our rewards on the audited tables: what they misjudge is known, and no more than that."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from audit import math_pairs, programs, rates
from wall import needs_wall

from vespo_megatron.rewards import code_tests, mathematics
from vespo_megatron.rewards.code import code_reward

MISJUDGED = {
    r"\boxed{5 \text{ m}}",  # for 5 cm: units are dropped
    r"\boxed{\log 2}",  # for ln 2: Math-Verify's log is to base 10
    r"\boxed{\sin 60^\circ}",
    r"\boxed{(2, \infty)}",  # for {x | x > 2}, which Math-Verify does not read
    r"\boxed{(1,2,3)}",  # for a column of a matrix
    r"\boxed{12 \text{ (since } 3 \cdot 4 = 12)}",
    r"\boxed{x = \frac{\pi}{6} + k\pi, k \in \mathbb{Z}}",
    r"\boxed{\mathbb{R}}",  # for "all real numbers"
}
"""Answers of the table that our reward is known to misjudge."""


def test_the_tables_are_as_large_as_an_audit_needs():
    assert len(math_pairs()) >= 150 and len(programs()) >= 60
    assert {case.kind for case in programs()} >= {"eurus", "apps", "taco", "livecodebench", "humaneval_plus"}


def test_mathematical_answers_are_judged_right_but_for_those_known():
    pairs = math_pairs()
    found = rates(pairs, [mathematics.math("", pair.response, pair.truth, {}) for pair in pairs])
    assert {case.response for case in found.misjudged} <= MISJUDGED
    assert found.false_negatives < 0.04 and found.false_positives < 0.01


@needs_wall
def test_programs_are_judged_right_in_every_form():
    cases = programs()

    def score(case):
        return code_reward(case.kind, case.response, case.truth, {}, test_timeout=60.0)["score"]

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = rates(cases, pool.map(score, cases))
    assert not found.misjudged


@pytest.mark.parametrize("truth", [None, "", "  ", [], [None], {}, "x^2 +", r"\frac{1}{", ["1", "x^2 +"]])
def test_a_ground_truth_that_no_answer_can_equal_is_told(truth):
    assert mathematics.unreadable(truth)


@pytest.mark.parametrize(
    "truth",
    [None, "", 5, "5", {}, {"cases": []}, [], {"inputs": [], "outputs": []}, {"inputs": ["1", "2"], "outputs": ["1"]}],
)
def test_a_ground_truth_without_tests_that_can_be_run_is_told(truth):
    assert code_tests.unreadable(truth)


def test_every_ground_truth_of_the_tables_can_be_read_but_for_one():
    unread = {str(pair.truth) for pair in math_pairs() if mathematics.unreadable(pair.truth)}
    assert unread == {r"\{x \mid x > 2\}"}
    assert not any(code_tests.unreadable(case.truth) for case in programs())
