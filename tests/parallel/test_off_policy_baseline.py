"""VCPO's baseline: every response's gradient norm against autograd of transformers' model, on every layout."""

from __future__ import annotations

import math

import baseline_work
import pytest
import torch
from test_layout_parity import LAYOUTS

from vespo_megatron.losses.advantage_estimators import EPSILON


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Sample id → (Σ log π_θ/μ, ‖∇ Σ log π‖), by transformers and one backward each."""
    _, model = checkpoint
    found = {}
    for sample in baseline_work.batch_with_rewards().samples:
        model.zero_grad()
        tokens = torch.from_numpy(sample.token_ids)
        logits = model(tokens[None]).logits[0, len(sample.prompt_ids) - 1 : -1] / 0.9
        mask = torch.from_numpy(sample.loss_mask)
        log_probs = logits.log_softmax(-1).gather(1, torch.from_numpy(sample.response_ids)[:, None])[:, 0][mask]
        log_probs.sum().backward()
        square = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
        gap = log_probs.detach().double().sum() - float(sample.behavior_log_probs[sample.loss_mask].astype(float).sum())
        found[sample.sample_id] = (float(gap), math.sqrt(square))
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "name",
    ["one", "dp2", "tp2_ep2", "pp2", "cp2", pytest.param("pp2_cp2_ep2", marks=pytest.mark.nightly)],
)
def test_norms_and_weights_are_those_of_one_backward_per_response(name, workers, checkpoint, expected):
    world_size, layout = LAYOUTS.get(name, (1, {}))
    answers = workers.run(baseline_work.facts_and_advantages, world_size, folder=checkpoint[0], layout=layout)
    for answer in answers:
        assert len(answer["facts"]) == len(expected)
        for facts in answer["facts"]:
            gap, norm = expected[facts.sample_id]
            assert facts.gradient_norm == pytest.approx(norm, rel=1e-4, abs=1e-6), facts.sample_id
            assert facts.log_weight == pytest.approx(gap, abs=2e-4), facts.sample_id
            assert facts.is_trained == (facts.sample_id not in ("s6", "s9"))
    advantages = {key: value for answer in answers for key, value in answer["advantages"].items()}
    samples = {sample.sample_id: sample for sample in baseline_work.batch_with_rewards().samples}
    for prompt in {sample.prompt_id for sample in samples.values()}:
        members = [key for key, one in samples.items() if one.prompt_id == prompt and key not in ("s6", "s9")]
        rewards = torch.tensor([samples[key].reward for key in members], dtype=torch.float64)
        weight = torch.tensor([2 * expected[key][0] + 2 * math.log(expected[key][1]) for key in members]).softmax(0)
        baseline, spread = float((weight * rewards).sum()), float(rewards.std())
        for key, reward in zip(members, rewards.tolist(), strict=True):
            wanted = (reward - baseline) / (spread + EPSILON if spread else 1.0)
            assert advantages[key] == pytest.approx(wanted, abs=2e-3), key
    assert advantages["s6"] == advantages["s9"] == 0.0
