"""VESPO against its reference formula and the numbers of the paper, extremes included."""

import math

import pytest
import torch

from tests.losses.batches import apart
from vespo_megatron.losses import LossInputs, PolicyLossConfig, compute_policy_loss, policy_loss

NUM = 10_000


def reference(log_ratio, advantages, mask):
    """The padded reference: tokens and S clamped to ±20, W ≥ 1e-8, W^c1·e^(c2(1−W)), not finite → 0; [B], [B, T]."""
    s = (log_ratio.clamp(-20, 20) * mask).sum(1).clamp(-20, 20)
    w = s.exp().clamp(min=1e-8)
    c1 = torch.where(advantages >= 0, 2.0, 3.0)
    c2 = torch.where(advantages >= 0, 3.0, 2.0)
    return (c2 + c1 * w.log() - c2 * w).exp().nan_to_num(0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vespo_equals_the_padded_reference_on_ten_thousand_sequences_extremes_included(dtype):
    generator = torch.Generator().manual_seed(0)
    width = 24
    scale = torch.logspace(-3, 2, NUM, dtype=torch.float64)[:, None]
    log_ratio = (torch.randn(NUM, width, generator=generator, dtype=torch.float64) * scale).to(dtype)
    log_ratio[0], log_ratio[1], log_ratio[2] = 5.0, -5.0, 1e30  # S = ±120, and beyond any clamp
    log_ratio[3] = -1e30
    log_ratio[4] = 1e-9
    mask = torch.rand(NUM, width, generator=generator) > 0.3
    mask[5:40] = False
    advantages = torch.randn(NUM, generator=generator, dtype=dtype)
    advantages[40:60] = 0.0
    cu = torch.arange(0, NUM * width + 1, width)
    log_probs, behavior = apart(log_ratio.flatten())
    log_probs = torch.where(mask.flatten(), log_probs, torch.nan).requires_grad_()
    output = policy_loss(log_probs, behavior, advantages, cu, mask=mask.flatten())
    output.loss.backward()
    phi = reference((log_probs.detach() - behavior).view(NUM, width).nan_to_num(0, 0, 0), advantages, mask)
    expected = phi[:, None] * mask
    assert ((log_ratio * mask).sum(1).abs() > 20).sum() > 1000
    torch.testing.assert_close(output.coefficient.view(NUM, width), expected, rtol=1e-5, atol=1e-6)
    gradient = -(expected * advantages[:, None] / mask.sum()).flatten()
    torch.testing.assert_close(log_probs.grad, gradient, rtol=1e-5, atol=1e-6 / int(mask.sum()))
    for value in (output.loss, output.coefficient, log_probs.grad):
        assert value.isfinite().all()
    assert all(math.isfinite(value) for value in output.metrics.finalize().values())


def phi_of(w, positive):
    log_probs, behavior = apart(torch.tensor([math.log(w)], dtype=torch.float64))
    advantage = torch.tensor([1.0 if positive else -1.0])
    return float(policy_loss(log_probs.requires_grad_(), behavior, advantage, torch.tensor([0, 1])).coefficient)


@pytest.mark.parametrize(
    ("positive", "table"),
    [
        (True, {0.1: 0.1488, 0.5: 1.1204, 0.8: 1.1662, 1: 1.0, 2: 0.1991, 4: 0.0020}),
        (False, {0.1: 0.0060, 0.5: 0.3398, 0.8: 0.7638, 1: 1.0, 2: 1.0827, 4: 0.1586}),
    ],
)
def test_phi_has_the_values_of_the_table(positive, table):
    for w, expected in table.items():
        assert round(phi_of(w, positive), 4) == expected


def test_w_to_zero_and_to_infinity_give_zero_and_never_nan():
    for s in (-1e308, -1e5, -50.0, 50.0, 1e5, 1e308):
        log_probs, behavior = apart(torch.tensor([s], dtype=torch.float64))
        for advantage in (1.0, -1.0):
            output = policy_loss(log_probs, behavior, torch.tensor([advantage]), torch.tensor([0, 1]))
            assert 0 <= float(output.coefficient) < 1e-10


def test_the_sign_of_the_advantage_is_taken_from_unmasked_tokens():
    log_probs = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    log_probs, behavior = (log_probs - 1).detach().requires_grad_(), torch.full((3,), -0.7, dtype=torch.float64)
    advantages = torch.tensor([-5.0, 1.0, 1.0])
    output = policy_loss(log_probs, behavior, advantages, torch.tensor([0, 3]), mask=torch.tensor([False, True, True]))
    w = math.exp(-0.6)
    assert output.coefficient.tolist() == pytest.approx([0.0, *[w**2 * math.exp(3 * (1 - w))] * 2])


def test_constants_are_free_and_asymmetric():
    log_probs, behavior = apart(torch.tensor([-0.4, 0.2], dtype=torch.float64))
    constants = {"c1_pos": 1.3, "c2_pos": 0.7, "c1_neg": 2.1, "c2_neg": 4.9}
    output = policy_loss(
        log_probs.requires_grad_(), behavior, torch.tensor([1.0, -1.0]), torch.tensor([0, 1, 2]), **constants
    )
    w1, w2 = math.exp(-0.4), math.exp(0.2)
    expected = [w1**1.3 * math.exp(0.7 * (1 - w1)), w2**2.1 * math.exp(4.9 * (1 - w2))]
    assert output.coefficient.tolist() == pytest.approx(expected, rel=1e-14)


def test_a_bfloat16_log_prob_is_computed_in_float32_and_gets_its_gradient_in_its_own_type():
    log_probs = torch.full((4,), -1.0, dtype=torch.bfloat16, requires_grad=True)
    output = policy_loss(log_probs, torch.full((4,), -1.01), torch.ones(2), torch.tensor([0, 2, 4]))
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and log_probs.grad.dtype == torch.bfloat16


def test_a_micro_batch_without_tokens_or_sequences_has_loss_zero():
    for cu in ([0], [0, 0, 0]):
        log_probs = torch.zeros(0, requires_grad=True)
        inputs = LossInputs(
            log_probs, torch.zeros(0), torch.zeros(len(cu) - 1), torch.tensor(cu), advantage_level="sequence"
        )
        for name in ("vespo", "grpo", "minpro"):
            output = compute_policy_loss(inputs, PolicyLossConfig(name))
            output.loss.backward()
            assert float(output.loss) == 0.0
            output.metrics.finalize()
