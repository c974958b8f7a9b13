"""RSPO's router shift: γ against a formula in float64, γ̃ in a surrogate's ratio or beside φ, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.losses.batches import loss_inputs, make_batch
from tests.losses.surrogates import GIVEN, SURROGATES, clip_cov, maspo, surrogate_gradient
from vespo_megatron.errors import UserError
from vespo_megatron.losses import (
    PolicyLossConfig,
    RouterShift,
    compute_policy_loss,
    get_objective,
    policy_loss,
    router_shift,
)

TOKENS, LAYERS, EXPERTS, TOPK = 6, 3, 8, 2
FLOOR = RouterShift.floor
WITH_RATIO = [name for name in SURROGATES if get_objective(name).uses_ratio]


def gradient(batch, name, apply=None, behavior=None, **changes):
    leaf = batch.leaf()
    needs_old = behavior == "recompute" or get_objective(name).anchor == "old"
    behavior = "recompute" if needs_old else "rollout"
    inputs = loss_inputs(batch, leaf, old_log_probs=batch.old_log_probs if needs_old else None, **changes)
    shift = None if apply is None else RouterShift(apply)
    config = PolicyLossConfig(name, GIVEN.get(name, {}), behavior=behavior, router_shift=shift)
    output = compute_policy_loss(inputs, config)
    output.loss.backward()
    return output, leaf.grad


def log_weight(batch):
    """log γ̃, by its definition."""
    values = [math.log(max(value, 0.8)) for value in batch.router_shift.nan_to_num(1.0).tolist()]
    return torch.tensor(values, dtype=torch.float64)


def router_log_probs(seed):
    """(log r_θ, log r_old) [tokens, layers, experts] in float64, and the experts active under π_old."""
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(TOKENS, LAYERS, EXPERTS, generator=generator, dtype=torch.float64)
    new = old + 0.3 * torch.randn(TOKENS, LAYERS, EXPERTS, generator=generator, dtype=torch.float64)
    return new.log_softmax(-1), old.log_softmax(-1), old.topk(TOPK).indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("floor", [0.0, 0.8])
def test_gamma_is_the_formula(floor, dtype):
    new, old, experts = router_log_probs(0)
    found = router_shift(new.gather(-1, experts).to(dtype), old.gather(-1, experts).to(dtype), floor=floor)
    for token in range(TOKENS):
        product = 1.0  # of (r_θ/r_old)^±1 over layers and experts, whichever is below 1
        for layer in range(LAYERS):
            for expert in experts[token, layer].tolist():
                ratio = math.exp(float(new[token, layer, expert])) / math.exp(float(old[token, layer, expert]))
                product *= min(ratio, 1 / ratio)
        expected = max(product ** (1 / (LAYERS * TOPK)), floor)
        assert float(found[token]) == pytest.approx(expected, abs=1e-6 if dtype == torch.float32 else 1e-14)
    assert found.dtype == dtype and floor <= float(found.min()) < float(found.max()) < 1


def test_routers_that_have_not_moved_weigh_exactly_one_and_nothing_flows_back():
    new, _, experts = router_log_probs(1)
    leaf = new.gather(-1, experts).requires_grad_()
    found = router_shift(leaf, leaf)
    assert (found == 1).all() and not found.requires_grad


def shifted_surrogate_gradient(batch, name):
    """∇ of the surrogate with w·γ̃ in place of w, γ̃ a constant."""
    shift, surrogate = log_weight(batch), SURROGATES[name]
    if name.startswith("dppo"):  # no ratio here is near its bound: γ̃ is a factor
        return surrogate_gradient(batch, surrogate) * shift.exp()
    with_shift = replace(batch, old_log_probs=shift)  # these two look at μ beside the ratio, and not at π_old
    if name == "maspo":
        return surrogate_gradient(with_shift, lambda lp, mu, shift, a: maspo(lp + shift, mu, shift, a))
    if name == "clip_cov":
        return surrogate_gradient(with_shift, lambda lp, mu, shift, a: clip_cov(lp, mu, shift, a, shift))
    below = {"behavior_log_probs": batch.behavior_log_probs - shift, "old_log_probs": batch.old_log_probs - shift}
    return surrogate_gradient(replace(batch, **below), surrogate)


@pytest.mark.parametrize("name", WITH_RATIO)
def test_before_the_clip_it_is_in_the_surrogate_s_ratio(name):
    for seed in range(4):
        batch = make_batch(seed, probabilities=name.startswith("dppo"))
        _, found = gradient(batch, name, "before_clip")
        torch.testing.assert_close(found, shifted_surrogate_gradient(batch, name), rtol=0, atol=1e-10)
        assert not torch.equal(found, gradient(batch, name)[1])


@pytest.mark.parametrize("name", SURROGATES)
def test_after_the_clip_it_multiplies_each_token_s_coefficient(name):
    batch = make_batch(5)
    plain, expected = gradient(batch, name)
    output, found = gradient(batch, name, "after_clip")
    weight = log_weight(batch).exp()
    torch.testing.assert_close(found, expected * weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.coefficient, plain.coefficient * weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("apply", ["before_clip", "after_clip"])
@pytest.mark.parametrize("name", ["vespo", "grpo", "gspo", "gmpo"])
def test_a_shift_of_one_is_no_shift(name, apply):
    batch = make_batch(6)
    ones = torch.ones_like(batch.router_shift)
    found, expected = gradient(batch, name, apply, router_shift=ones)[1], gradient(batch, name)[1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_both_orders_in_numbers():
    """ρ = 1.5 and γ = .85, A = 1: 1.275 is inside GRPO's clip of 1.28, 1.5 is not."""
    log_probs, anchor = torch.zeros(1), torch.tensor([-math.log(1.5)])
    for apply, expected in (("before_clip", 1.275), ("after_clip", 0.0)):
        output = policy_loss(
            log_probs.clone().requires_grad_(),
            anchor,
            torch.ones(1),
            torch.tensor([0, 1]),
            name="grpo",
            router_shift=torch.tensor([0.85]),
            router_shift_apply=apply,
        )
        assert float(output.coefficient) == pytest.approx(expected)


@pytest.mark.parametrize("behavior", ["rollout", "recompute"])
def test_metrics_are_of_the_weights_and_w_is_without_them(behavior):
    batch = make_batch(4)
    weights, gamma = log_weight(batch).exp()[batch.mask], batch.router_shift[batch.mask]
    plain = gradient(batch, "grpo", behavior=behavior)[0].metrics.finalize()
    for apply in ("before_clip", "after_clip"):
        found = gradient(batch, "grpo", apply, behavior=behavior)[0].metrics.finalize()
        assert found["router_shift/mean"] == pytest.approx(float(weights.mean()))
        assert found["router_shift/floored"] == pytest.approx(float((gamma <= FLOOR).double().mean()))
        for name in ("vespo/w_mean", "vespo/ess", "mismatch/k3", "vespo/log_w_max"):
            assert found[name] == pytest.approx(plain[name])
    assert not any(name.startswith("router_shift") for name in plain)


@pytest.mark.parametrize("apply", ["before_clip", "after_clip"])
def test_with_a_correction_each_weight_acts_where_it_is_told_to(apply):
    """π_old/μ, truncated at 1.05, after the clip; γ̃ before it, or beside it."""
    batch = make_batch(8)
    correction = {"weight": "tis", "high": 1.05}
    given = {"name": "grpo", "mask": batch.mask, "old_log_probs": batch.old_log_probs}
    leaf = batch.leaf()
    tensors = (batch.behavior_log_probs, batch.advantages, batch.cu_seqlens)
    shift = {"router_shift": batch.router_shift, "router_shift_apply": apply}
    policy_loss(leaf, *tensors, correction=correction, **shift, **given).loss.backward()
    alone = gradient(batch, "grpo", apply, behavior="recompute")[1]
    weight = (batch.old_log_probs - batch.behavior_log_probs).exp().clamp(max=1.05).nan_to_num(0.0)
    torch.testing.assert_close(leaf.grad, alone * weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("apply", ["before_clip", "after_clip"])
def test_a_shift_that_is_no_number_is_a_bad_sample(apply):
    batch = make_batch(9)
    token = int(batch.cu_seqlens[3])
    batch.mask[token] = True
    for values in (batch.log_probs, batch.behavior_log_probs):
        values[token] = -1.0
    batch.router_shift[token] = torch.nan
    output, found = gradient(batch, "grpo", apply)
    assert output.bad_sequences.nonzero().flatten().tolist() == [3]
    assert not found[batch.segment_ids == 3].any() and found.isfinite().all()


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"router_shift": torch.tensor([0.5, 1.5])}, "router_shift"),
        ({"router_shift": torch.tensor([0.5, -0.1])}, "router_shift"),
        ({"router_shift": torch.tensor([1, 1])}, "router_shift"),
        ({"router_shift": torch.ones(3)}, "router_shift"),
        ({"router_shift": torch.ones(2), "router_shift_floor": 0.0}, "loss_fn.router_shift.floor"),
        ({"router_shift": torch.ones(2), "router_shift_floor": 1.5}, "loss_fn.router_shift.floor"),
        ({"router_shift": torch.ones(2), "router_shift_apply": "before"}, "loss_fn.router_shift.apply"),
        ({"router_shift": torch.ones(2), "name": "reinforce"}, "loss_fn.router_shift.apply"),
    ],
)
def test_what_means_nothing_is_refused_by_its_name(given, where):
    values = -torch.ones(2)
    with pytest.raises(UserError) as error:
        policy_loss(values, values, torch.ones(1), torch.tensor([0, 2]), **{"name": "grpo", **given})
    assert error.value.where == where


def test_a_loss_that_is_to_weigh_and_is_given_no_shift_says_so():
    batch = make_batch(0)
    with pytest.raises(UserError, match="router_shift"):
        gradient(batch, "grpo", "before_clip", router_shift=None)


@pytest.mark.parametrize("shapes", [((4, 3, 2), (4, 3, 1)), ((4, 2), (4, 2)), ((4, 0, 2), (4, 0, 2))])
def test_log_probs_of_other_shapes_are_refused(shapes):
    with pytest.raises(UserError, match=r"\[tokens, layers, K\]"):
        router_shift(*(torch.zeros(shape) for shape in shapes))
