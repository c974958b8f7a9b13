"""Intervals and tests against SciPy's own forms and against what is known of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vespo_megatron.study.statistics import holm, mean, paired

VALUES = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=2, max_size=12)


@given(VALUES)
def test_the_interval_is_scipy_s(values):
    ours = mean(values)
    assert ours.value == pytest.approx(np.mean(values))
    spread = stats.sem(values)
    assert ours.half == pytest.approx(spread * stats.t.ppf(0.975, len(values) - 1), abs=1e-12)


def test_one_seed_has_no_interval_and_none_has_no_mean():
    assert math.isnan(mean([0.5]).half) and mean([0.5]).text() == "0.500"
    assert mean([]).text() == "-"


def test_a_pair_is_tested_as_scipy_does():
    left, right = [0.9, 0.8, 0.95, 0.7], [0.5, 0.6, 0.4, 0.65]
    assert paired(left, right).p == pytest.approx(stats.ttest_rel(left, right).pvalue)


def test_the_same_runs_twice_are_no_difference_and_a_single_pair_says_nothing():
    same = holm([paired([0.3, 0.9, 0.4], [0.3, 0.9, 0.4])])[0]
    assert (same.p, same.verdict) == (1.0, "no difference found")
    assert holm([paired([0.9], [0.1])])[0].verdict == "too few seeds to say"


def test_a_hundred_null_studies_find_a_difference_in_about_five():
    """Noise alone: the rate of false findings in a family of four comparisons stays near its level."""
    chance = np.random.default_rng(0)
    false = 0
    for _ in range(400):
        baseline = chance.normal(0.5, 0.1, 5)
        family = holm([paired(list(baseline + chance.normal(0, 0.05, 5)), list(baseline)) for _ in range(4)])
        false += any(difference.verdict != "no difference found" for difference in family)
    assert false / 400 < 0.08


def test_seeds_that_differ_by_the_same_are_as_much_as_their_signs():
    """Accuracies of 128 answers have few values: one null comparison in two hundred would be certain by chance."""
    alike = paired([0.875, 0.9375, 0.90625], [0.90625, 0.96875, 0.9375])
    assert alike.p == 0.25 and holm([alike])[0].verdict == "no difference found"
    assert paired([0.3 + 0.1] * 12, [0.1] * 12).p == paired([0.4, 0.7] * 6, [0.1, 0.4] * 6).p == 2**-11
    chance = np.random.default_rng(0)
    accuracies = chance.binomial(128, 0.9, (2000, 2, 3)) / 128
    assert np.mean([holm([paired(*each)])[0].verdict != "no difference found" for each in accuracies]) < 0.06


def test_holm_by_hand():
    """Of three p values the smallest counts three times, the next twice, and none less than the one before it."""
    differences = [paired([0.0, 0.1], [0.0, 0.0])] * 3
    made = [type(d)(d.mean, p) for d, p in zip(differences, [0.04, 0.01, 0.03], strict=True)]
    assert [d.adjusted_p for d in holm(made)] == pytest.approx([0.06, 0.03, 0.06])
