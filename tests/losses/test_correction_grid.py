"""Every row of "theirs → ours": a point of the grid equals the other framework's correction, written out apart.

Formulas are of one response at a time, in Python floats: from d = log w of its tokens, the weight and the mask of each.
Bounds are wider than the frameworks' defaults where those would keep nothing of these batches.
"""

import math

import pytest
import torch

from tests.losses.batches import loss_inputs, make_batch
from vespo_megatron.losses import CorrectionConfig, PolicyLossConfig, compute_policy_loss, correction_counts
from vespo_megatron.losses.aggregation import Normalizer


def product(d):
    return math.exp(sum(d))


def geometric_mean(d):
    return math.exp(sum(d) / len(d))


def k3(d):
    return [math.exp(x) - 1 - x for x in d]


def truncated(w, high, low=0.0):
    return min(max(w, low), high)


def unchanged(d):
    return [1.0] * len(d)


def all_or_nothing(condition, d):
    return [float(condition)] * len(d)


def within(x, low, high):
    return low <= x <= high


def tokens(high, low=0.0):
    return lambda d: [truncated(math.exp(x), high, low) for x in d]


def responses(value, high, low=0.0):
    return lambda d: [truncated(value(d), high, low)] * len(d)


def masked_tokens(low, high):
    return lambda d: [float(within(math.exp(x), low, high)) for x in d]


def masked_responses(value, low, high):
    return lambda d: all_or_nothing(within(value(d), low, high), d)


def mean_k3_at_most(high):
    return lambda d: all_or_nothing(sum(k3(d)) / len(d) <= high, d)


def token_ratios(d):
    return [math.exp(x) for x in d]


def one_product(d):
    return [product(d)] * len(d)


GEO = {"level": "mean", "low": 0.95, "high": 1.05}
K3 = {"statistic": "k3", "level": "mean", "high": 0.004}
TOKEN, SEQUENCE = {"weight": "tis", "high": 1.1}, {"weight": "tis", "level": "sequence", "high": 1.3}
MASK_GEO, MASK_K3 = masked_responses(geometric_mean, 0.95, 1.05), mean_k3_at_most(0.004)

# label: (ours, weights of d, mask of d); the denominator is theirs.
RECOMPUTE = {
    "verl decoupled_token_is": (TOKEN, tokens(1.1), unchanged),
    "verl decoupled_seq_is": (SEQUENCE, responses(product, 1.3), unchanged),
    "verl decoupled_seq_is_rs": (
        {**SEQUENCE, "reject": [{"level": "sum", "low": 0.7, "high": 1.4}], "denominator": "kept"},
        responses(product, 1.3),
        masked_responses(product, 0.7, 1.4),
    ),
    "verl decoupled_geo_rs": ({"reject": [GEO], "denominator": "kept"}, unchanged, MASK_GEO),
    "verl decoupled_geo_rs_seq_tis": (
        {**SEQUENCE, "reject": [GEO], "denominator": "kept"},
        responses(product, 1.3),
        MASK_GEO,
    ),
    "verl decoupled_geo_rs_token_tis": ({**TOKEN, "reject": [GEO], "denominator": "kept"}, tokens(1.1), MASK_GEO),
    "verl decoupled_k3_rs": ({"reject": [K3], "denominator": "kept"}, unchanged, MASK_K3),
    "verl decoupled_k3_rs_seq_tis": (
        {**SEQUENCE, "reject": [K3], "denominator": "kept"},
        responses(product, 1.3),
        MASK_K3,
    ),
    "verl decoupled_k3_rs_token_tis": ({**TOKEN, "reject": [K3], "denominator": "kept"}, tokens(1.1), MASK_K3),
    "verl token_k1 (bounds on μ/π)": (
        {"reject": [{"level": "token", "low": 1 / 1.2, "high": 1 / 0.9}], "denominator": "kept"},
        unchanged,
        lambda d: [float(math.log(0.9) <= -x <= math.log(1.2)) for x in d],
    ),
    "verl seq_max_k2": (
        {"reject": [{"statistic": "k2", "level": "max", "high": 0.02}], "denominator": "kept"},
        unchanged,
        lambda d: all_or_nothing(max(x * x / 2 for x in d) <= 0.02, d),
    ),
    "verl token_k3,seq_sum_k2": (
        {
            "reject": [
                {"statistic": "k3", "level": "token", "high": 0.01},
                {"statistic": "k2", "level": "sum", "high": 0.04},
            ],
            "denominator": "kept",
        },
        unchanged,
        lambda d: [float(y <= 0.01 and sum(x * x / 2 for x in d) <= 0.04) for y in k3(d)],
    ),
    "TRL token_truncate": ({"weight": "tis", "high": 1.1, "low": 0.9}, tokens(1.1, 0.9), unchanged),
    "TRL token_mask": (
        {"weight": "mis", "low": 0.0, "high": 1.1},
        lambda d: [w if w <= 1.1 else 0.0 for w in token_ratios(d)],
        unchanged,
    ),
    "TRL sequence_truncate": (
        {"weight": "tis", "level": "sequence", "high": 1.3},
        responses(product, 1.3),
        unchanged,
    ),
    "TRL sequence_mask": (
        {"weight": "mis", "level": "sequence", "low": 0.0, "high": 1.3},
        lambda d: [product(d) if product(d) <= 1.3 else 0.0] * len(d),
        unchanged,
    ),
    "slime vanilla tis": ({"weight": "tis", "low": 0.95, "high": 1.1}, tokens(1.1, 0.95), unchanged),
    "slime mis clip, geometric": (
        {"weight": "tis", "level": "geometric", "low": 1 / 1.05, "high": 1.05},
        responses(geometric_mean, 1.05, 1 / 1.05),
        unchanged,
    ),
    "slime mis mask, token": (
        {"weight": "mis", "low": 1 / 1.1, "high": 1.1, "denominator": "kept"},
        token_ratios,
        masked_tokens(1 / 1.1, 1.1),
    ),
    "slime mis truncate + rs geometric + veto": (
        {**TOKEN, "reject": [GEO], "veto": 0.85, "denominator": "kept"},
        tokens(1.1),
        lambda d: all_or_nothing(within(geometric_mean(d), 0.95, 1.05) and min(token_ratios(d)) >= 0.85, d),
    ),
    "NeMo-RL tis": ({"weight": "tis", "high": 1.1}, tokens(1.1), unchanged),
    "NeMo-RL icepop": (
        {"weight": "icepop", "low": 0.9, "high": 1.1},
        lambda d: [w if within(w, 0.9, 1.1) else 0.0 for w in token_ratios(d)],
        unchanged,
    ),
    "NeMo-RL seq-mask-tis": (
        {"weight": "tis", "high": math.inf, "reject": [GEO]},
        lambda d: [w * within(geometric_mean(d), 0.95, 1.05) for w in token_ratios(d)],
        unchanged,
    ),
    "NeMo-RL sequence-level correction": (
        {"weight": "tis", "level": "sequence", "high": math.inf},
        one_product,
        unchanged,
    ),
    "AReaL mask, token ratio": (
        {"weight": "mis", "low": 0.0, "high": 1.1, "denominator": "kept"},
        token_ratios,
        masked_tokens(0.0, 1.1),
    ),
    "AReaL mask, sequence ratio": (
        {"weight": "mis", "level": "geometric", "low": 0.95, "high": 1.05, "denominator": "kept"},
        lambda d: [geometric_mean(d)] * len(d),
        MASK_GEO,
    ),
    "AReaL clamp, sequence ratio": (
        {"weight": "tis", "level": "geometric", "low": 0.95, "high": 1.05},
        responses(geometric_mean, 1.05, 0.95),
        unchanged,
    ),
}
ROLLOUT = {
    "verl bypass_pg_is": (SEQUENCE, responses(product, 1.3), unchanged),
    "verl bypass_pg_geo_rs": ({"reject": [GEO], "denominator": "kept"}, unchanged, MASK_GEO),
    "verl bypass_pg_geo_rs_seq_tis": (
        {**SEQUENCE, "reject": [GEO], "denominator": "kept"},
        responses(product, 1.3),
        MASK_GEO,
    ),
    "verl bypass_pg_geo_rs_token_tis": ({**TOKEN, "reject": [GEO], "denominator": "kept"}, tokens(1.1), MASK_GEO),
    "VESPO equation 30": (
        {"weight": "tis", "level": "sequence", "high": 1.05},
        lambda d: [min(product(d), 1.05)] * len(d),
        unchanged,
    ),
}


def unmasked(batch, values):
    """The values of each response's unmasked tokens, as lists of floats."""
    rows = [[] for _ in range(batch.num_sequences)]
    for value, row, kept in zip(values.tolist(), batch.segment_ids.tolist(), batch.mask.tolist(), strict=True):
        if kept:
            rows[row].append(value)
    return rows


def spread_out(batch, rows):
    """[tokens]: lists of the unmasked tokens back in their places, 0 where masked."""
    flat = [value for row in rows for value in row]
    out = torch.zeros(len(batch.mask), dtype=torch.float64)
    out[batch.mask] = torch.tensor(flat, dtype=torch.float64)
    return out


def expected_gradient(batch, phi, gap, weigh, keep, normalize=False):
    """−φ·w·mask·A over the number of kept tokens: [tokens]; `weigh` and `keep` are of one response's d."""
    d = unmasked(batch, gap)
    weights = spread_out(batch, [weigh(row) if row else [] for row in d])
    mask = spread_out(batch, [keep(row) if row else [] for row in d])
    if normalize:
        weights = weights / weights[batch.mask].mean()
    total = mask.sum() if keep is not unchanged else batch.mask.sum()
    return -phi * weights * mask * batch.advantages[batch.segment_ids] / total


def found_gradient(batch, name, behavior, correction, **hyperparameters):
    config = PolicyLossConfig(
        name, hyperparameters, behavior=behavior, correction=CorrectionConfig.from_mapping(correction)
    )
    leaf = batch.leaf()
    inputs = loss_inputs(batch, leaf)
    normalizer = Normalizer.from_lengths(batch.unmasked_lengths)
    counts = correction_counts(inputs, config)
    normalizer = normalizer.corrected(counts, kept=config.correction.denominator == "kept")
    compute_policy_loss(inputs, config, normalizer).loss.backward()
    return leaf.grad


def clean(batch, values):
    return torch.where(batch.mask, values, 0.0)


def clipped(ratio, advantage):
    return torch.where(torch.where(advantage >= 0, ratio <= 1.28, ratio >= 0.8), ratio, 0.0)


@pytest.mark.parametrize("label", RECOMPUTE)
@pytest.mark.parametrize("seed", [3, 4])
def test_a_row_with_three_policies(label, seed):
    """w = π_old/μ beside PPO's clip of π_θ/π_old. A token that is dropped has no φ, so the order does not matter."""
    ours, weigh, keep = RECOMPUTE[label]
    batch = make_batch(seed)
    advantage = batch.advantages[batch.segment_ids]
    phi = clean(batch, clipped((batch.log_probs - batch.old_log_probs).exp(), advantage))
    gap = clean(batch, batch.old_log_probs - batch.behavior_log_probs)
    expected = expected_gradient(batch, phi, gap, weigh, keep)
    found = found_gradient(batch, "grpo", "recompute", ours, dual_clip=None)
    assert 0 < int((expected != 0).sum())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("label", ROLLOUT)
@pytest.mark.parametrize("seed", [3, 4])
def test_a_row_with_two_policies(label, seed):
    """w = π_θ/μ and φ = 1."""
    ours, weigh, keep = ROLLOUT[label]
    batch = make_batch(seed, scale=0.03)
    gap = clean(batch, batch.log_probs - batch.behavior_log_probs)
    expected = expected_gradient(batch, clean(batch, torch.ones_like(gap)), gap, weigh, keep)
    found = found_gradient(batch, "reinforce", "rollout", ours)
    assert 0 < int((expected != 0).sum())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("correction", "keep"), [({"reject": [GEO]}, MASK_GEO), ({"reject": [K3]}, MASK_K3)])
def test_ppo_with_two_policies_and_a_rejection(correction, keep):
    """verl's bypass_ppo_clip_geo_rs and bypass_ppo_clip_k3_rs."""
    batch = make_batch(3, scale=0.03)
    gap = clean(batch, batch.log_probs - batch.behavior_log_probs)
    phi = clean(batch, clipped(gap.exp(), batch.advantages[batch.segment_ids]))
    expected = expected_gradient(batch, phi, gap, unchanged, keep)
    found = found_gradient(batch, "grpo", "rollout", {**correction, "denominator": "kept"}, dual_clip=None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_batch_normalised_weights_have_mean_one():
    """verl's rollout_is_batch_normalize and slime's tis_batch_normalize, over tokens and over responses."""
    batch = make_batch(3)
    gap = clean(batch, batch.old_log_probs - batch.behavior_log_probs)
    one = clean(batch, torch.ones_like(gap))
    expected = expected_gradient(batch, one, gap, tokens(1.1), unchanged, normalize=True)
    found = found_gradient(batch, "reinforce", "recompute", {**TOKEN, "normalize": True})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    products = [min(product(row), 1.3) for row in unmasked(batch, gap) if row]
    mean = sum(products) / len(products)
    expected = expected_gradient(batch, one, gap, responses(product, 1.3), unchanged) / mean
    found = found_gradient(batch, "reinforce", "recompute", {**SEQUENCE, "normalize": True})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_normalised_weight_before_the_clip_is_the_normalised_weight_after_it_of_an_objective_that_does_not_clip():
    batch = make_batch(5)
    for correction in (TOKEN, SEQUENCE, {**TOKEN, "reject": [{"level": "token", "low": 0.9, "high": 1.15}]}):
        both = [
            found_gradient(
                batch, "cispo", "recompute", {**correction, "normalize": True, "apply": apply}, ratio_max=1e6
            )
            for apply in ("before_clip", "after_clip")
        ]
        torch.testing.assert_close(*both, rtol=0, atol=1e-12)
