"""What is searched for in a mini-batch: as the sources find it, and the same however the mini-batch is cut."""

import pytest
import torch

from tests.losses.batches import loss_inputs, make_batch, select_sequences
from tests.losses.test_surrogates import run
from vespo_megatron.errors import UserError
from vespo_megatron.losses import (
    PolicyLossConfig,
    compute_policy_loss,
    compute_ratios,
    get_objective,
    objective_names,
)
from vespo_megatron.losses.search import found_in

SEARCHED = [name for name in objective_names() if get_objective(name).search]
WITHOUT_TIES = (6, 9, 0, 14, 4, 21)
"""Lengths of a batch in which no two tokens have the same numbers."""
SMALL = {"clip_cov": {"share": 0.1, "cov_low": 0.05}, "kl_cov": {"share": 0.1}, "m2po": {"m2_threshold": 0.03}}


def ratios_of(batch, config):
    return compute_ratios(loss_inputs(batch, batch.log_probs, old_log_probs=None), config)


def columns(batch):
    """A, log π and log ρ of the unmasked tokens."""
    kept = batch.mask
    advantage = batch.advantages[batch.segment_ids][kept]
    return advantage, batch.log_probs[kept], (batch.log_probs - batch.behavior_log_probs)[kept]


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("seed", [2, 3])
def test_what_is_found_does_not_depend_on_how_the_mini_batch_is_cut(name, seed):
    batch = make_batch(seed)
    config = PolicyLossConfig(name, SMALL.get(name, {}))
    (search,) = config.searches
    whole = search.found(search.contributions(ratios_of(batch, config)))
    pieces = [select_sequences(batch, numbers)[0] for numbers in ([8, 3, 1], [0, 7], [2, 6, 4, 5])]
    found = found_in(search, [ratios_of(piece, config) for piece in pieces], None)
    assert set(found) == set(whole)
    for key, value in found.items():
        torch.testing.assert_close(value, whole[key], rtol=1e-12, atol=1e-14)
    given = SMALL.get(name, {}) | {key: float(value) for key, value in whole.items()}
    assert not PolicyLossConfig(name, given).searches
    alone, told = run(batch, name, **SMALL.get(name, {}))[1], run(batch, name, **given)[1]
    torch.testing.assert_close(told, alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize("threshold", [1e-4, 0.02, 0.05, 10.0])
def test_m2po_masks_as_areal_does(threshold):
    """_get_m2po_loss_mask: the largest go until the mean of the rest is below the threshold; one stays."""
    for seed in range(5):
        batch = make_batch(seed)
        values = columns(batch)[2].square().sort(descending=True).values
        masked = 0
        while masked < len(values) - 1 and not values[masked:].mean() < threshold:
            masked += 1
        config = PolicyLossConfig("m2po", {"m2_threshold": threshold})
        (search,) = config.searches
        found = search.found(search.contributions(ratios_of(batch, config)))["m2_max"]
        assert int((values <= found).sum()) == len(values) - masked


def test_kl_cov_pulls_the_tokens_that_verl_takes():
    batch = make_batch(3, WITHOUT_TIES)
    advantage, log_prob, _ = columns(batch)
    covariance = (advantage - advantage.mean()) * (log_prob - log_prob.mean())
    taken = covariance.topk(max(1, int(0.1 * len(covariance)))).indices
    with_pull, without = (run(batch, "kl_cov", share=0.1, kl_coefficient=c)[1][batch.mask] for c in (1.0, 0.0))
    differ = (with_pull != without).nonzero()[:, 0]
    assert set(differ.tolist()) == set(taken.tolist())


def test_clip_cov_draws_as_many_as_verl_from_those_it_draws_from():
    batch = make_batch(3, WITHOUT_TIES)
    advantage, log_prob, log_ratio = columns(batch)
    ratio = log_ratio.exp()
    covariance = (advantage - advantage.mean()) * (log_prob - log_prob.mean())
    clipped = torch.where(advantage >= 0, ratio > 1.28, ratio < 0.8)
    candidates = ((covariance > 0.05) & (covariance < 5.0) & ~clipped).nonzero()[:, 0].tolist()
    number = min(max(int(0.1 * len(covariance)), 1), len(candidates))
    drawn, plain = (
        run(batch, name, **given)[1][batch.mask] for name, given in (("clip_cov", SMALL["clip_cov"]), ("grpo", {}))
    )
    differ = (drawn != plain).nonzero()[:, 0].tolist()
    assert len(differ) == number and set(differ) <= set(candidates)


def entropies(batch):
    """[tokens]: no two alike."""
    return torch.linspace(0.1, 2.0, len(batch.mask), dtype=torch.float64).flip(0).sqrt()


def masked_by_entropy(batch, name, **hyperparameters):
    leaf = batch.leaf()
    output = compute_policy_loss(
        loss_inputs(batch, leaf, old_log_probs=None, entropy=entropies(batch)), PolicyLossConfig(name, hyperparameters)
    )
    output.loss.backward()
    return leaf.grad


@pytest.mark.parametrize("name", ["vespo", "grpo", "gspo", "m2po"])
@pytest.mark.parametrize("fraction", [0.2, 0.55, 1.0])
def test_the_top_entropy_mask_is_trl_s_quantile_whatever_the_objective(name, fraction):
    batch = make_batch(3)
    entropy = entropies(batch)
    least = torch.quantile(entropy[batch.mask], 1 - fraction)
    plain = masked_by_entropy(batch, name)
    expected = torch.where(entropy >= least, plain, 0.0)
    found = masked_by_entropy(batch, name, top_entropy_fraction=fraction)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    given = masked_by_entropy(batch, name, top_entropy_fraction=fraction, entropy_min=float(least))
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-14)


def test_the_mask_says_what_it_misses():
    batch = make_batch(3)
    with pytest.raises(UserError, match="entropy: is missing"):
        run(batch, "grpo", top_entropy_fraction=0.2)
    for wrong in (0.0, 1.5, -1.0):
        with pytest.raises(UserError, match="top_entropy_fraction"):
            masked_by_entropy(batch, "grpo", top_entropy_fraction=wrong)
