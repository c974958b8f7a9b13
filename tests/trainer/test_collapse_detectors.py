"""Collapse is told by stated rules, once, and healthy training is left alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vespo_megatron.recipe.schema import GuardConfig
from vespo_megatron.trainer.collapse_detectors import CollapseDetectors

HEALTHY = {
    "reward/mean": 0.6,
    "reward/std": 0.3,
    "response/length_mean": 200.0,
    "response/truncated_fraction": 0.1,
    "policy/entropy": 1.2,
    "loss/grad_norm_max": 0.5,
}


def watch(steps: list[dict]) -> list[tuple[int, str]]:
    """(step, rule) of everything said."""
    detectors = CollapseDetectors(GuardConfig())
    return [(step, finding.rule) for step, metrics in enumerate(steps) for finding in detectors.observe(metrics)]


@pytest.mark.parametrize(
    ("rule", "change", "latest"),
    [
        ("reward", {"reward/mean": 0.0}, 9),
        ("signal", {"reward/std": 0.0}, 10),
        ("length", {"response/length_mean": 3.0}, 9),
        ("truncated", {"response/truncated_fraction": 1.0}, 10),
        ("entropy", {"policy/entropy": 0.001}, 10),
        ("loss", {"loss/grad_norm_max": 80.0}, 0),
    ],
)
def test_each_collapse_is_told_once_within_a_window(rule, change, latest):
    said = watch([HEALTHY] * 30 + [HEALTHY | change] * 30)
    assert [name for _, name in said] == [rule]
    assert 30 <= said[0][0] <= 30 + latest


def test_what_recovers_and_collapses_again_is_told_again():
    down = HEALTHY | {"reward/mean": -0.5}
    assert [name for _, name in watch(([HEALTHY] * 30 + [down] * 15) * 2)] == ["reward", "reward"]


def test_noise_about_a_trend_is_no_collapse():
    random = np.random.default_rng(0)
    steps = [
        {
            "reward/mean": 0.2 + 0.5 * step / 300 + 0.1 * random.standard_normal(),
            "reward/std": 0.3,
            "response/length_mean": 300 - 0.5 * step + 20 * random.standard_normal(),
            "response/truncated_fraction": float(random.uniform(0, 0.5)),
            "policy/entropy": 1.5 * math.exp(-step / 150) + 0.1,
            "loss/grad_norm_max": float(random.lognormal(0, 1)),
        }
        for step in range(300)
    ]
    assert watch(steps) == []


def test_a_rule_that_is_switched_off_says_nothing():
    config = GuardConfig(reward_drop=None, length_drop=None, truncated_share=None, entropy_drop=None, loss_spike=None)
    detectors = CollapseDetectors(config)
    worst = dict.fromkeys(HEALTHY, 0.0) | {"response/truncated_fraction": 1.0, "loss/grad_norm_max": 1e9}
    worst["reward/std"] = 0.1
    assert not [finding for metrics in [HEALTHY] * 30 + [worst] * 30 for finding in detectors.observe(metrics)]


numbers = st.one_of(st.none(), st.floats(), st.integers(-(2**63), 2**63))


@given(st.lists(st.dictionaries(st.sampled_from(sorted(HEALTHY)), numbers), max_size=60))
@example([{"loss/grad_norm_max": 1.7e308}] * 3)  # their sum overflows
def test_no_metric_makes_a_detector_fail(steps):
    detectors = CollapseDetectors(GuardConfig(window=3))
    for metrics in steps:
        for finding in detectors.observe(metrics):
            assert finding.text and "nan" not in finding.text
