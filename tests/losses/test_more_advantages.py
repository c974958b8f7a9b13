"""Advantages that weigh tokens, parts, pass@k and truncated responses, each against the formula of its source."""

import itertools
import math
import statistics

import pytest
import torch

from tests.losses.batches import make_batch
from vespo_megatron.errors import UserError
from vespo_megatron.losses import AGGREGATIONS, AdvantageOptions, Normalizer, compute_advantages, policy_loss

GENERATOR = torch.Generator().manual_seed(5)
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 5, 5]
REWARDS = [1, 0, 0, 0, 1, 1, 0.5, 0.25, 0, 1, 1, 1, 0, 1, 0.1, 0.1, 0.1, 0.9]
LENGTHS = torch.randint(1, 30, (len(GROUPS),), generator=GENERATOR).tolist()


def nemo_rl_advantage(rewards, groups, *, leave_one_out, normalize):
    """NeMo-RL: utils.py `calculate_baseline_and_std_per_prompt` and `GRPOAdvantageEstimator`, in exact fractions."""
    from fractions import Fraction

    out = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        members = [j for j, other in enumerate(groups) if other == group]
        seen = [Fraction(str(rewards[j])) for j in members if not (leave_one_out and j == i)]
        if len(members) <= 1:
            out.append(0.0)
            continue
        mean = sum(seen) / len(seen)
        variance = sum((x - mean) ** 2 for x in seen) / (len(seen) - 1) if len(seen) > 1 else Fraction(0)
        advantage = float(Fraction(str(reward)) - mean)
        out.append(advantage / (math.sqrt(variance) + 1e-6) if normalize and variance > 0 else advantage)
    return out


def test_the_issues_numbers_of_nemo_rls_leave_one_out():
    found = compute_advantages([1, 0, 0, 0], [0] * 4, "leave_one_out_std").values
    assert found[0] == 1.0 and float(found[1]) == pytest.approx(-0.57735, abs=1e-5)


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_auto_is_what_nemo_rls_two_switches_say_there(leave_one_out, normalize):
    from vespo_megatron.losses import resolve_estimator

    name = resolve_estimator("auto", normalize_rewards=normalize, use_leave_one_out_baseline=leave_one_out)
    found = compute_advantages(REWARDS, GROUPS, name).values.tolist()
    expected = nemo_rl_advantage(REWARDS, GROUPS, leave_one_out=leave_one_out, normalize=normalize)
    assert found == pytest.approx(expected, abs=1e-10)


def test_opo_is_verls_length_weighted_baseline():
    found = compute_advantages(REWARDS, GROUPS, "opo", lengths=LENGTHS).values.tolist()
    for i, group in enumerate(GROUPS):
        members = [j for j, other in enumerate(GROUPS) if other == group]
        baseline = sum(LENGTHS[j] * REWARDS[j] for j in members) / sum(LENGTHS[j] for j in members)
        assert found[i] == pytest.approx(REWARDS[i] - baseline, abs=1e-12)


@pytest.mark.parametrize("baseline", [True, False])
def test_whitening_over_tokens_is_nemo_rls(baseline):
    name = "reinforce_plus_plus_baseline_tokens" if baseline else "reinforce_plus_plus_tokens"
    found = compute_advantages(REWARDS, GROUPS, name, lengths=LENGTHS).values.tolist()
    tokens = []
    for i, group in enumerate(GROUPS):
        mean = statistics.fmean(r for r, g in zip(REWARDS, GROUPS, strict=True) if g == group) if baseline else 0.0
        tokens += [REWARDS[i] - mean] * LENGTHS[i]
    mean, deviation = statistics.fmean(tokens), statistics.pstdev(tokens)
    starts = [0, *itertools.accumulate(LENGTHS)][:-1]
    assert found == pytest.approx([(tokens[start] - mean) / deviation for start in starts], abs=1e-10)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_pass_at_k_is_the_mean_over_all_subsets(k):
    """Advantage of a response: mean reward of the k-subsets it is in, normalised by all subsets' mean and deviation."""
    for right in range(6):
        rewards = [1.0] * right + [0.0] * (5 - right)
        found = compute_advantages(rewards, ["p"] * 5, "pass_at_k", pass_at_k=k).values.tolist()
        subsets = list(itertools.combinations(range(5), k))
        value = {subset: max(rewards[i] for i in subset) for subset in subsets}
        rho = statistics.fmean(value.values())
        for i in range(5):
            mine = statistics.fmean(value[subset] for subset in subsets if i in subset)
            assert found[i] == pytest.approx((mine - rho) / (math.sqrt(rho * (1 - rho)) + 1e-6), abs=1e-9)


def test_pass_at_k_wants_answers_that_are_right_or_wrong():
    with pytest.raises(UserError, match=r"reward of 0\.5"):
        compute_advantages([1, 0.5], [0, 0], "pass_at_k", pass_at_k=2)


@pytest.mark.parametrize("base", ["group_mean_std", "leave_one_out_std"])
def test_gdpo_normalises_each_part_in_its_group_and_the_sum_over_the_batch(base):
    """NeMo-RL's `GDPOAdvantageEstimator`; with the group's own mean and deviation the paper's and TRL's."""
    parts = {"right": REWARDS, "short": [1 / length for length in LENGTHS]}
    weights = {"right": 2.0, "short": 0.5}
    found = compute_advantages(
        REWARDS, GROUPS, "gdpo", parts=parts, part_weights=weights, part_estimator=base
    ).values.tolist()
    leave_one_out = base != "group_mean_std"
    columns = {n: nemo_rl_advantage(v, GROUPS, leave_one_out=leave_one_out, normalize=True) for n, v in parts.items()}
    total = [sum(weights[name] * columns[name][i] for name in parts) for i in range(len(GROUPS))]
    mean, deviation = statistics.fmean(total), statistics.stdev(total)
    assert found == pytest.approx([(x - mean) / deviation for x in total], abs=1e-9)


def test_gdpo_without_parts_says_what_to_name():
    with pytest.raises(UserError, match=r"(?s)0 parts of the reward.*env\.rewards"):
        AdvantageOptions("gdpo")


def test_advantages_are_clipped_after_normalisation():
    found = compute_advantages(REWARDS, GROUPS, clip_low=-0.5, clip_high=0.25)
    assert found.values.min() == -0.5 and found.values.max() == 0.25
    with pytest.raises(UserError, match="advantage_clip_low: is 2"):
        AdvantageOptions(clip_low=2.0, clip_high=1.0)


CUT = [i % 5 == 1 for i in range(len(GROUPS))]


@pytest.mark.parametrize("overlong", ["drop", "zero_advantage"])
@pytest.mark.parametrize("estimator", ["group_mean_std", "leave_one_out_std", "reinforce_plus_plus_tokens"])
def test_truncated_responses_have_no_advantage_and_count_in_the_baseline_if_asked(overlong, estimator):
    options = {"lengths": LENGTHS, "truncated": CUT, "overlong": overlong}
    inside = compute_advantages(REWARDS, GROUPS, estimator, **options)
    outside = compute_advantages(REWARDS, GROUPS, estimator, **options, overlong_in_baseline=False)
    rest = [i for i, cut in enumerate(CUT) if not cut]
    alone = compute_advantages(
        [REWARDS[i] for i in rest], [GROUPS[i] for i in rest], estimator, lengths=[LENGTHS[i] for i in rest]
    )
    torch.testing.assert_close(outside.values[rest], alone.values, rtol=0, atol=1e-12)
    if estimator != "reinforce_plus_plus_tokens":  # which has no group statistics
        whole = compute_advantages(REWARDS, GROUPS, estimator, lengths=LENGTHS)
        torch.testing.assert_close(inside.values[rest], whole.values[rest], rtol=0, atol=0)
    for found in (inside, outside):
        assert found.keep.all() and not found.values[torch.tensor(CUT)].any()
        assert found.masked.tolist() == (CUT if overlong == "drop" else [False] * len(CUT))
        assert found.metrics["advantage/filtered_samples"] == sum(CUT)
        assert found.metrics["advantage/min"] == found.values[rest].min()


def test_a_group_that_is_all_truncated_or_differs_in_truncated_rewards_alone_has_no_signal():
    rewards, groups = [1, 0, 1, 1, 0], ["all cut", "all cut", "rest equal", "rest equal", "rest equal"]
    cut = [True, True, False, False, True]
    settings = {"truncated": cut, "overlong": "drop", "drop_groups_without_signal": True}
    assert compute_advantages(rewards, groups, **settings).keep.tolist() == [False, False, True, True, True]
    assert not compute_advantages(rewards, groups, **settings, overlong_in_baseline=False).keep.any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", ["vespo", "grpo", "gspo"])
def test_a_masked_response_leaves_numerator_and_denominator(name, aggregation):
    """The loss of a batch with a response that is filtered is that of the batch without it (TRL#6439)."""
    batch = make_batch(7)
    cut = 3
    inside = batch.segment_ids == cut
    mask = batch.mask & ~inside

    def gradient(tokens, sequences, mask):
        log_probs = batch.log_probs[tokens].clone().requires_grad_()
        lengths = batch.cu_seqlens.diff()[sequences]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        counts = [int(mask_of.sum()) for mask_of in mask.split(lengths.tolist())]
        output = policy_loss(
            log_probs,
            batch.behavior_log_probs[tokens],
            batch.advantages[sequences],
            offsets,
            name=name,
            mask=mask,
            aggregation=aggregation,
            normalizer=Normalizer.from_lengths(counts, 50.0),
        )
        output.loss.backward()
        return log_probs.grad

    everything = torch.arange(batch.num_sequences)
    whole = gradient(torch.ones_like(inside), everything, mask)
    without = gradient(~inside, everything[everything != cut], batch.mask[~inside])
    assert without.any() and not whole[inside].any()
    torch.testing.assert_close(whole[~inside], without, rtol=0, atol=1e-14)
