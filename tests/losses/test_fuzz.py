"""Nothing hides: over extremes, every gradient is finite, and what is not finite is found, counted and left out."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from tests.losses.fuzz import Draw, draws
from vespo_megatron.losses import LossInputs, PolicyLossConfig, compute_policy_loss, policy_loss


def check(draw: Draw) -> int:
    """How many sequences were tried; raises where something is hidden."""
    output, gradient = draw.output()
    assert gradient.isfinite().all() and output.loss.isfinite()
    assert torch.equal(output.bad_sequences, draw.bad), (output.bad_sequences, draw.bad)
    public = output.metrics.finalize()
    assert all(abs(value) < float("inf") for value in public.values()), public
    if draw.config.metrics == "full":
        assert public["loss/bad_samples"] == int(draw.bad.sum())
    return len(draw.bad)


def without_bad(draw: Draw) -> tuple[Draw, torch.Tensor]:
    """The draw with its bad sequences masked and made of zeros, and bool [tokens]: the tokens of the others."""
    inputs = draw.inputs
    bad = torch.repeat_interleave(draw.bad, inputs.cu_seqlens.diff())

    def clean(values):
        return None if values is None else torch.where(bad, 0.0, values)

    return (
        replace(
            draw,
            inputs=replace(
                inputs,
                log_probs=clean(inputs.log_probs),
                behavior_log_probs=clean(inputs.behavior_log_probs),
                old_log_probs=clean(inputs.old_log_probs),
                ref_log_probs=clean(inputs.ref_log_probs),
                advantages=torch.where(draw.bad, 0.0, inputs.advantages),
                mask=inputs.mask & ~bad,
            ),
            bad=torch.zeros_like(draw.bad),
        ),
        ~bad,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_is_not_finite_and_no_bad_sample_is_missed(dtype):
    assert sum(check(draw) for draw in islice(draws(1, dtype=dtype), 800)) == 6400


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_over_a_million_sequences():
    assert sum(check(draw) for draw in islice(draws(2, sequences=64), 16_000)) >= 1_000_000


def test_the_gradient_of_the_others_is_what_it_would_be_without_the_bad_ones():
    tried = 0
    for draw in islice(draws(3, dtype=torch.float64), 600):
        if draw.bad.any():
            alone, others = without_bad(draw)
            expected = alone.output()[1][others]
            torch.testing.assert_close(draw.output()[1][others], expected, rtol=1e-12, atol=1e-300)
            tried += 1
    assert tried > 100


def test_a_weight_that_overflows_is_no_gradient_that_is_not_a_number():
    """Decoupled PPO with a cap and one μ log-prob of −200: the loss was .667, its gradient NaN, nothing was said."""
    old = torch.full((3,), -1.0)
    log_probs, behavior = old.clone().requires_grad_(), torch.tensor([-1.0, -200.0, -1.0])
    output = policy_loss(
        log_probs,
        behavior,
        torch.ones(1),
        torch.tensor([0, 3]),
        name="decoupled_ppo",
        old_log_probs=old,
        behavior_weight_cap=5.0,
        on_bad_sample="drop",
    )
    output.loss.backward()
    assert log_probs.grad.isfinite().all()
    assert log_probs.grad.tolist() == pytest.approx([-1 / 3, 0.0, -1 / 3]) and not output.bad_sequences.any()


def not_a_number(ratios):
    """A user's φ that is NaN for one token, or for one sequence."""
    return torch.where(ratios.log_ratio > 0.05, torch.nan, 1.0)


def not_a_number_per_sequence(ratios):
    return torch.where(ratios.sequence_log_ratio > 0.05, torch.nan, 1.0)


not_a_number_per_sequence.level = "sequence"


@pytest.mark.parametrize("phi", ["not_a_number", "not_a_number_per_sequence"])
@pytest.mark.parametrize("metrics", ["none", "full"])
def test_a_phi_that_is_not_finite_makes_its_sequence_bad(phi, metrics):
    log_probs = torch.tensor([-0.9, -1.0, -1.0], requires_grad=True)
    inputs = LossInputs(log_probs, -torch.ones(3), torch.ones(2), torch.tensor([0, 2, 3]))
    config = PolicyLossConfig(f"tests.losses.test_fuzz:{phi}", on_bad_sample="drop", metrics=metrics)
    output = compute_policy_loss(inputs, config)
    output.loss.backward()
    assert output.bad_sequences.tolist() == [True, False]
    assert log_probs.grad.tolist() == [0.0, 0.0, -1.0] and float(output.loss.detach()) == 1.0
    assert output.coefficient.tolist() == [0.0, 0.0, 1.0]
