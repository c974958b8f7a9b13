"""Advantages of turns against their formula written out turn by turn."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vespo_megatron.errors import UserError
from vespo_megatron.losses import compute_advantages, compute_turn_advantages

rewards = st.lists(
    st.tuples(st.sampled_from("abc"), st.lists(st.floats(-4, 4, width=16), max_size=4)), min_size=1, max_size=12
)


@given(rewards)
def test_a_turn_s_advantage_is_over_the_same_turn_of_its_group(drawn):
    """(r − mean)/(std + 1e-6) of those of the group that have the turn, n − 1, as MT-GRPO has each reward."""
    groups, values = [group for group, _ in drawn], [np.array(each) for _, each in drawn]
    found = compute_turn_advantages(values, groups)
    for group, own, advantages in zip(groups, values, found, strict=True):
        assert len(advantages) == len(own)
        for turn, reward in enumerate(own):
            same = [
                each[turn] for other, each in zip(groups, values, strict=True) if other == group and len(each) > turn
            ]
            spread = statistics.stdev(same) if len(same) > 1 else 0.0
            expected = (reward - statistics.fmean(same)) / (spread + 1e-6)
            assert advantages[turn] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_responses_of_one_turn_have_the_advantages_of_responses():
    values, groups = [1.0, 0.0, 0.5, 2.0], ["a", "a", "a", "b"]
    for estimator in ("group_mean", "group_mean_std", "leave_one_out", "leave_one_out_std"):
        found = compute_turn_advantages([np.array([value]) for value in values], groups, estimator)
        assert np.concatenate(found) == pytest.approx(compute_advantages(values, groups, estimator).values.numpy())


def test_equal_rewards_and_no_turns_at_all_have_none():
    found = compute_turn_advantages([np.full(2, 0.5), np.full(3, 0.5), np.zeros(0)], ["a", "a", "a"])
    assert [each.tolist() for each in found] == [[0.0, 0.0], [0.0, 0.0, 0.0], []]
    assert compute_turn_advantages([], []) == []


def test_what_does_not_fit_is_an_error():
    with pytest.raises(UserError, match="1 group ids for the rewards of 2 responses"):
        compute_turn_advantages([np.zeros(1), np.zeros(1)], ["a"])
    with pytest.raises(UserError, match="the reward of turn 1 is nan"):
        compute_turn_advantages([np.array([0.0, np.nan])], ["a"])
