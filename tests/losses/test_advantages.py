"""Advantages by explicit group id, uneven groups in any order; VCPO's learning rate beside them."""

import math
import statistics

import pytest
import torch

from vespo_megatron.errors import UserError
from vespo_megatron.losses import compute_advantages, learning_rate_scale, resolve_estimator
from vespo_megatron.losses.advantage_estimators import ESTIMATORS
from vespo_megatron.losses.vcpo import ResponseFacts, off_policy_advantages, off_policy_baseline

REWARDS = [1.0, 0.0, 0.5, 1.0, 0.25, 1.0, 1.0, 0.0, 0.75]
GROUPS = ["a", "b", "a", "c", "b", "c", "a", "d", "b"]  # sizes 3, 3, 2, 1; c has no signal


def direct(estimator):
    groups = {g: [r for r, h in zip(REWARDS, GROUPS, strict=True) if h == g] for g in set(GROUPS)}
    rows = []
    for r, g in zip(REWARDS, GROUPS, strict=True):
        values = groups[g]
        mean = statistics.fmean(values)
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        others = (sum(values) - r) / (len(values) - 1) if len(values) > 1 else r
        rest = list(values)
        rest.remove(r)
        spread_of_others = statistics.stdev(rest) if len(rest) > 1 else 0.0
        rows.append(
            {
                "group_mean": r - mean,
                "dr_grpo": r - mean,
                "group_mean_std": (r - mean) / (std + 1e-6),
                "leave_one_out": r - others,
                "leave_one_out_std": (r - others) / (spread_of_others + 1e-6) if spread_of_others else r - others,
                "leave_one_out_group_std": (r - others) / (std + 1e-6),
                "none": r,
                "reinforce_plus_plus": (r - statistics.fmean(REWARDS)) / (statistics.stdev(REWARDS) + 1e-6),
            }.get(estimator, r - mean)
        )
    if estimator == "reinforce_plus_plus_baseline":
        mean, std = statistics.fmean(rows), statistics.stdev(rows)
        rows = [(x - mean) / (std + 1e-6) for x in rows]
    return rows


PLAIN = [
    "group_mean",
    "group_mean_std",
    "leave_one_out",
    "leave_one_out_std",
    "leave_one_out_group_std",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "dr_grpo",
    "none",
]
"""Estimators that look at rewards and groups alone; the others are in test_more_advantages.py."""


@pytest.mark.parametrize("estimator", PLAIN)
def test_estimators_equal_their_definitions_on_uneven_groups(estimator):
    found = compute_advantages(REWARDS, GROUPS, estimator)
    assert found.values.tolist() == pytest.approx(direct(estimator), abs=1e-12)
    assert found.keep.all()


def test_leave_one_out_with_normalisation_divides_by_the_others_deviation():
    """NeMo-RL: where the others are alike nothing is divided. Ours gave 2.0 and −.667."""
    found = compute_advantages([1.0, 0.0, 0.0, 0.0], ["a"] * 4, "leave_one_out_std")
    assert found.values.tolist() == pytest.approx([1.0, -0.57735, -0.57735, -0.57735], abs=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_order_of_responses_does_not_matter(estimator):
    order = torch.randperm(len(REWARDS), generator=torch.Generator().manual_seed(0)).tolist()
    rewards = [float(r == 1) for r in REWARDS] if estimator == "pass_at_k" else REWARDS

    def made(order):
        columns = {"a": [rewards[i] for i in order], "b": [float(i % 3) for i in order]}
        return compute_advantages(
            columns["a"],
            [GROUPS[i] for i in order],
            estimator,
            lengths=[7 + i % 4 for i in order],
            parts=columns,
            part_weights={"a": 1.0, "b": 0.5},
            pass_at_k=2,
        ).values

    found, expected = made(order), made(list(range(len(REWARDS))))[order]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_groups_without_signal_are_dropped_only_when_asked():
    found = compute_advantages(REWARDS, GROUPS, drop_groups_without_signal=True)
    assert [g for g, keep in zip(GROUPS, found.keep.tolist(), strict=True) if not keep] == ["c", "c", "d"]
    assert found.metrics["advantage/groups_without_signal"] == 2
    assert found.metrics["advantage/dropped_samples"] == 3


def test_a_bad_reward_is_an_error_naming_sample_and_group_or_is_dropped_and_counted():
    rewards = [*REWARDS]
    rewards[4] = math.nan
    names = [f"s{i}" for i in range(len(rewards))]
    with pytest.raises(UserError, match=r"sample s4: reward is nan: group 'b' has no advantages"):
        compute_advantages(rewards, GROUPS, sample_ids=names)
    found = compute_advantages(rewards, GROUPS, "group_mean", on_bad_sample="drop")
    assert found.values.tolist()[1] == pytest.approx(0.0 - 0.375) and found.values[4] == 0
    assert found.keep.tolist() == [i != 4 for i in range(9)]
    assert found.metrics["advantage/bad_samples"] == 1


def test_lengths_that_differ_and_unknown_estimators_are_errors():
    with pytest.raises(UserError, match="8 group ids for rewards of shape"):
        compute_advantages(REWARDS, GROUPS[:-1])
    with pytest.raises(UserError, match="nearest is 'leave_one_out'"):
        compute_advantages(REWARDS, GROUPS, "leave_one_ou")
    with pytest.raises(UserError, match="nearest is 'group_mean'"):
        resolve_estimator("groupmean", normalize_rewards=True, use_leave_one_out_baseline=False)


def test_auto_follows_the_two_switches():
    names = [
        resolve_estimator("auto", normalize_rewards=std, use_leave_one_out_baseline=loo)
        for std in (True, False)
        for loo in (True, False)
    ]
    assert names == ["leave_one_out_std", "group_mean_std", "leave_one_out", "group_mean"]


def test_ess_scales_the_learning_rate_down_and_never_up():
    assert learning_rate_scale(0.25) == 1.0
    assert learning_rate_scale(0.25, "sqrt") == 0.5
    assert learning_rate_scale(0.25, "linear") == 0.25
    assert learning_rate_scale(0.9, "sqrt", rho_base=0.55) == 1.0
    assert learning_rate_scale(0.11, "linear", rho_base=0.55) == pytest.approx(0.2)
    with pytest.raises(UserError, match="nearest is 'sqrt'"):
        learning_rate_scale(0.5, "sqr")


def test_a_baseline_ignores_what_is_not_trained_on_or_not_finite():
    def fact(name, reward, *, log_weight=0.0, norm=1.0, trained=True):
        return ResponseFacts(name, "p", reward, trained, log_weight, norm)

    plain = [fact("a", 1.0, log_weight=400.0), fact("b", 0.0, log_weight=400.0, norm=2.0)]
    more = [fact("c", 9.0, trained=False), fact("d", 5.0, log_weight=math.nan), fact("e", 5.0, norm=math.inf)]
    found = off_policy_advantages(plain + more, normalize=False)
    assert (found["a"], found["b"], found["c"]) == (pytest.approx(0.8), pytest.approx(-0.2), 0.0)
    scaled = off_policy_advantages(plain, normalize=True)
    assert scaled["a"] == pytest.approx(0.8 / (math.sqrt(0.5) + 1e-6))


def test_off_policy_baseline_minimises_the_variance_it_is_derived_from():
    w, g, r = [0.5, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 0.0, 1.0]
    b = off_policy_baseline(w, g, r)

    def moment(b):
        return sum((x * y * (z - b)) ** 2 for x, y, z in zip(w, g, r, strict=True))

    assert moment(b) < min(moment(b - 1e-3), moment(b + 1e-3))
