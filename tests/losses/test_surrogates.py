"""Every φ is the gradient of its published surrogate, on and off the clip bounds, to 1e-10."""

import math

import pytest
import torch

from tests.losses.batches import apart, make_batch
from tests.losses.surrogates import GIVEN, SURROGATES, VARIANTS, bapo, surrogate_gradient
from vespo_megatron.losses import (
    AGGREGATIONS,
    CorrectionConfig,
    LossInputs,
    PolicyLossConfig,
    compute_policy_loss,
    get_objective,
    objective_names,
    policy_loss,
)
from vespo_megatron.losses.bapo import candidates

LENGTH = 16.0


def run(batch, name, aggregation="token-mean", per_token=False, correction=None, behavior=None, **hyperparameters):
    if behavior is None:
        behavior = "recompute" if get_objective(name).anchor == "old" else "rollout"
    log_probs = batch.leaf()
    output = compute_policy_loss(
        LossInputs(
            log_probs,
            batch.behavior_log_probs,
            batch.token_advantages if per_token else batch.advantages,
            batch.cu_seqlens,
            mask=batch.mask,
            old_log_probs=batch.old_log_probs if behavior == "recompute" else None,
        ),
        PolicyLossConfig(
            name,
            hyperparameters,
            aggregation,
            LENGTH,
            behavior,
            CorrectionConfig.from_mapping(correction),
        ),
    )
    output.loss.backward()
    return output, log_probs.grad


def test_every_objective_has_a_surrogate_to_be_compared_with():
    assert set(SURROGATES) == set(objective_names())


@pytest.mark.parametrize("name", SURROGATES)
def test_gradient_is_that_of_the_published_surrogate(name):
    for seed in range(4):
        batch = make_batch(seed, probabilities=name.startswith("dppo"))
        for aggregation in AGGREGATIONS:
            _, gradient = run(batch, name, aggregation, **GIVEN.get(name, {}))
            expected = surrogate_gradient(batch, SURROGATES[name], aggregation)
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)
            assert not gradient[~batch.mask].any()
            assert gradient[batch.mask].any()


def test_maspo_s_width_is_bounded_as_in_its_source():
    """π_old = e⁻¹², ρ = 15, A = 1: σ is 10 · 1.03, not e^3.6 · 1.03, so φ is 5.96 and not 14.0."""
    old, log_probs = torch.tensor([-12.0]).double(), (torch.tensor([-12.0]).double() + math.log(15)).requires_grad_()
    output = policy_loss(log_probs, old, torch.ones(1), torch.tensor([0, 1]), name="maspo")
    assert float(output.coefficient) == pytest.approx(15 * math.exp(-(14**2) / (2 * 10.3**2)))
    assert float(output.coefficient) == pytest.approx(5.96, abs=0.005)


@pytest.mark.parametrize("name", objective_names())
def test_phi_of_a_negative_is_bounded(name):
    """A log-ratio of 15 gave 3.3e6 in six objectives."""
    needs_old = get_objective(name).anchor == "old"
    for log_ratio in (15.0, 9.0, 700.0):
        log_probs, anchor = torch.zeros(1, requires_grad=True), torch.tensor([-log_ratio])
        output = policy_loss(
            log_probs,
            anchor,
            -torch.ones(1),
            torch.tensor([0, 1]),
            name=name,
            old_log_probs=anchor if needs_old else None,
        )
        assert float(output.coefficient) <= (
            math.exp(10) if "log_ratio_max" in get_objective(name).hyperparameters else 20.0
        )


@pytest.mark.parametrize(("name", "hyperparameters", "surrogate"), VARIANTS)
def test_gradient_of_a_variant_is_that_of_its_surrogate(name, hyperparameters, surrogate):
    for seed in range(4):
        batch = make_batch(seed)
        _, gradient = run(batch, name, **hyperparameters)
        torch.testing.assert_close(gradient, surrogate_gradient(batch, surrogate), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in SURROGATES if get_objective(n).level == "token" or n == "vespo"])
def test_gradient_with_one_advantage_per_token_is_that_of_the_surrogate(name):
    batch = make_batch(7, probabilities=name.startswith("dppo"))
    _, gradient = run(batch, name, per_token=True, **GIVEN.get(name, {}))
    expected = surrogate_gradient(batch, SURROGATES[name], per_token=True)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", objective_names())
def test_gradient_is_phi_times_advantage_and_the_coefficient_says_which(name):
    batch = make_batch(3)
    output, gradient = run(batch, name)
    expected = -output.coefficient * batch.advantages[batch.segment_ids] / batch.mask.sum()
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    assert not output.coefficient.requires_grad


def test_a_bound_is_inclusive_and_the_next_number_is_outside():
    for value, advantage, kept in ((1.28, 1.0, True), (0.8, -1.0, True), (1.28, -1.0, True), (0.8, 1.0, True)):
        edge = torch.tensor([value], dtype=torch.float64).log()
        inward = edge - 1e-12 if value > 1 else edge + 1e-12
        outward = edge + 1e-12 if value > 1 else edge - 1e-12
        pushes_out = (value > 1) == (advantage > 0)
        for log_ratio, expected in ((inward, kept), (outward, not pushes_out)):
            log_probs, behavior = apart(log_ratio)
            output = policy_loss(
                log_probs.requires_grad_(),
                behavior,
                torch.tensor([advantage]),
                torch.tensor([0, 1]),
                name="grpo",
            )
            assert bool(output.coefficient[0] != 0) is expected


def test_bapo_moves_the_lower_bound_to_its_end_then_the_upper_until_the_share_is_reached():
    found = set()
    for seed in range(30):
        batch = make_batch(seed, scale=1.0)
        batch.advantages += (seed - 15) / 15
        index = batch.mask.nonzero().flatten()
        ratio = (batch.log_probs - batch.behavior_log_probs)[index].exp()
        a = batch.advantages[batch.segment_ids][index]

        def share(low, high, ratio=ratio, a=a):
            positive = sum(min(r, high) * x for r, x in zip(ratio.tolist(), a.tolist(), strict=True) if x >= 0)
            negative = sum(max(r, low) * -x for r, x in zip(ratio.tolist(), a.tolist(), strict=True) if x < 0)
            return positive / (positive + negative)

        low, high = 0.6, 1.2
        lows, highs = candidates(0.6, 0.9, 0.05), candidates(1.2, 3.0, 0.05)
        for low in lows:
            if share(low, high) >= 0.5:
                break
        else:
            for high in highs:
                if share(low, high) >= 0.5:
                    break
        found.add((low, high))
        _, gradient = run(batch, "bapo")
        expected = surrogate_gradient(batch, lambda *x, low=low, high=high: bapo(*x, low=low, high=high))
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)
    assert (0.6, 1.2) in found and (0.9, 3.0) in found and len(found) > 2


def test_opsm_silences_negative_responses_the_policy_has_left_and_nothing_else():
    for name in ("vespo", "grpo"):
        batch = make_batch(5)
        _, gradient = run(batch, name)
        _, masked = run(batch, name, opsm_delta=0.02)
        d = torch.where(batch.mask, batch.behavior_log_probs - batch.log_probs, 0.0)
        mean = torch.zeros(batch.num_sequences).double().index_add_(0, batch.segment_ids, d)
        mean /= torch.tensor(batch.unmasked_lengths).clamp(min=1)
        silent = (batch.advantages < 0) & (mean > 0.02)
        assert silent.any() and not silent.all()
        expected = torch.where(silent[batch.segment_ids], 0.0, gradient)
        torch.testing.assert_close(masked, expected, rtol=0, atol=1e-12)


def test_kl_and_entropy_terms_are_aggregated_like_the_loss():
    batch = make_batch(2)
    ref = batch.behavior_log_probs + 0.3
    for kind, function in (
        ("k1", lambda r: -r),
        ("k2", lambda r: r**2 / 2),
        ("k3", lambda r: r.exp() - 1 - r),
    ):
        for aggregation in AGGREGATIONS:
            log_probs, entropy = batch.leaf(), batch.leaf()
            config = PolicyLossConfig(
                "reinforce", {}, aggregation, LENGTH, kl_coefficient=0.1, kl_type=kind, entropy_coefficient=0.01
            )
            output = compute_policy_loss(
                LossInputs(
                    log_probs,
                    batch.behavior_log_probs,
                    batch.advantages * 0,
                    batch.cu_seqlens,
                    mask=batch.mask,
                    ref_log_probs=ref,
                    entropy=entropy,
                ),
                config,
            )
            output.loss.backward()
            kl = surrogate_gradient(
                batch,
                lambda lp, mu, old, a, function=function: -0.1 * function(mu + 0.3 - lp).sum(),
                aggregation,
            )
            torch.testing.assert_close(log_probs.grad, kl, rtol=0, atol=1e-12)
            bonus = surrogate_gradient(batch, lambda lp, mu, old, a: 0.01 * lp.sum(), aggregation)
            torch.testing.assert_close(entropy.grad, bonus, rtol=0, atol=1e-12)
