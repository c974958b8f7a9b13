"""The KL penalty: its estimates, their clamps and weights, against NeMo-RL's and against the exact gradient."""

import math

import pytest
import torch

from vespo_megatron.errors import UserError
from vespo_megatron.losses import LossInputs, PolicyLossConfig, compute_policy_loss
from vespo_megatron.losses.config import KL_TYPES, KL_WEIGHTS
from vespo_megatron.losses.regularization import kl_estimate


def of_nemo_rl(log_probs, reference, kind, weights, most=20.0, result=10.0):
    """calculate_kl of nemo_rl/algorithms/utils.py, token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for index in range(len(log_probs)):
        r, weight = reference[index] - log_probs[index], weights[index]
        if abs(float(r)) > most:
            r, weight = r.detach().clamp(-most, most), weight.detach()
        kl = {"k1": -r, "k2": r * r / 2, "k3": r.exp() - 1 - r}[kind] * weight
        total = total + (kl if abs(float(kl)) <= result else torch.tensor(math.copysign(result, float(kl))).double())
    return total


def some(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("kind", KL_TYPES)
@pytest.mark.parametrize("weight", KL_WEIGHTS)
def test_it_is_nemo_rl_s(kind, weight):
    reference, behavior = some(-1.0, -0.2, -30.0, -0.1, -2.0), some(-1.1, -3.0, -1.0, -25.0, -2.2)
    old = some(-1.05, -3.1, -1.2, -24.0, -2.1)
    ours, theirs = (some(-1.2, -3.5, -1.0, -25.5, -2.0).requires_grad_() for _ in range(2))
    config = PolicyLossConfig(
        "reinforce", behavior="recompute", kl_coefficient=1.0, kl_type=kind, kl_weight=weight, metrics="none"
    )
    inputs = LossInputs(ours, behavior, some(0.0), torch.tensor([0, 5]), old_log_probs=old, ref_log_probs=reference)
    (compute_policy_loss(inputs, config).loss * 5).backward()
    denominator = {"none": theirs.detach(), "score": theirs.detach(), "anchor": old, "behavior": behavior}[weight]
    weights = torch.ones(5).double() if weight == "none" else (theirs - denominator).exp()
    of_nemo_rl(theirs, reference, kind, weights).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KL_TYPES)
def test_weighted_by_the_ratio_its_expectation_has_the_gradient_of_the_kl(kind):
    """Over every outcome of a categorical μ: E_μ[(π/μ)·k] has the gradient of E_π[k]: of the KL for k1 and k3."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    behavior = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    log_probs = logits.log_softmax(0)
    estimate = kl_estimate(log_probs, reference, kind, log_weight=log_probs - behavior, output_clamp=None)
    (found,) = torch.autograd.grad((behavior.exp() * estimate).sum(), logits, retain_graph=True)
    r = reference - log_probs
    exact = (log_probs.exp() * ({"k1": -r, "k2": r**2 / 2, "k3": -r}[kind])).sum()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if kind == "k3":  # unweighted it is another gradient
        (other,) = torch.autograd.grad((behavior.exp() * kl_estimate(log_probs, reference, kind)).sum(), logits)
        assert (other - expected).abs().max() > 1e-2


def test_a_reference_that_is_far_has_no_gradient_of_millions():
    """k3 of a reference 17 nats above had a gradient of 3e7."""
    for clamps, least in (({}, 0.0), ({"kl_input_clamp": None, "kl_output_clamp": None}, 2e7)):
        log_probs = some(-17.3).requires_grad_()
        inputs = LossInputs(log_probs, some(-17.3), some(0.0), torch.tensor([0, 1]), ref_log_probs=some(-0.1))
        compute_policy_loss(inputs, PolicyLossConfig("reinforce", kl_coefficient=1.0, **clamps)).loss.backward()
        assert least <= float(log_probs.grad.abs()) <= max(least * 2, 10.0)


def test_a_wrong_value_is_an_error():
    for field, value in (("kl_input_clamp", 0.0), ("kl_output_clamp", -1.0), ("kl_weight", "ratio")):
        with pytest.raises(UserError, match="loss_fn"):
            PolicyLossConfig(**{field: value})
