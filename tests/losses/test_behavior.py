"""What W and d compare in each behaviour mode, on numbers; and the reference's own policy loss, written out apart."""

import math

import pytest
import torch

from tests.losses.batches import loss_inputs, make_batch
from vespo_megatron.losses import PolicyLossConfig, compute_policy_loss
from vespo_megatron.losses.behavior import BEHAVIORS, describe
from vespo_megatron.metrics.documentation import markdown


def reference_phi(log_ratio, advantage):
    """compute_policy_loss_vespo of FloyedShen/VESPO (recipe/vespo/code/core_algos.py), one response at a time.

    Tokens clamped to ±20 and summed, the sum clamped to ±20, log W = S, φ = exp(c2 + c1·log W − c2·W).
    """
    s = float(sum(min(max(x, -20.0), 20.0) for x in log_ratio))
    s = min(max(s, -20.0), 20.0)
    w = max(math.exp(s), 1e-8)
    c1, c2 = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
    return math.exp(c2 + c1 * math.log(w) - c2 * w)


def reference_loss(batch, anchor):
    """Its token-mean loss and gradient: −φ·A·log π over all unmasked tokens; `anchor` is what it calls old_log_prob."""
    gradient = torch.zeros(len(batch.mask), dtype=torch.float64)
    total = batch.mask.sum()
    for row in range(batch.num_sequences):
        here = (batch.segment_ids == row) & batch.mask
        phi = reference_phi((batch.log_probs - anchor)[here].tolist(), float(batch.advantages[row]))
        gradient[here] = -phi * batch.advantages[row] / total
    return float((gradient[batch.mask] * batch.log_probs[batch.mask]).sum()), gradient


def run(batch, behavior, name="vespo"):
    leaf = batch.leaf()
    old = None if behavior == "rollout" else batch.old_log_probs
    inputs = loss_inputs(batch, leaf, old_log_probs=old)
    output = compute_policy_loss(inputs, PolicyLossConfig(name, behavior=behavior))
    output.loss.backward()
    return output, leaf.grad


@pytest.mark.parametrize("behavior", BEHAVIORS)
@pytest.mark.parametrize("seed", range(4))
def test_the_reference_s_loss_with_what_it_is_given_for_old(behavior, seed):
    """Its synchronous scripts give π_old by the trainer, its asynchronous one gives the engine's log-probs."""
    batch = make_batch(seed)
    loss, gradient = reference_loss(batch, batch.behavior_log_probs if behavior == "rollout" else batch.old_log_probs)
    output, found = run(batch, behavior)
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-10)
    assert float(output.loss) == pytest.approx(loss, abs=1e-10)


@pytest.mark.parametrize("behavior", BEHAVIORS)
@pytest.mark.parametrize("name", ["vespo", "grpo", "dppo_tv"])
def test_metrics_compare_what_they_say(behavior, name):
    batch = make_batch(5)
    policies = {
        "π_θ": torch.where(batch.mask, batch.log_probs, 0.0),
        "μ": torch.where(batch.mask, batch.behavior_log_probs, 0.0),
        "π_old": torch.where(batch.mask, batch.old_log_probs, 0.0),
    }
    above, below = BEHAVIORS[behavior].ratio.split("/")
    if name == "dppo_tv":
        below = "μ"
    log_w = torch.zeros(batch.num_sequences, dtype=torch.float64)
    log_w.index_add_(0, batch.segment_ids, policies[above] - policies[below])
    left, right = (policies[part.removeprefix("log ")] for part in BEHAVIORS[behavior].gap.split(" − "))
    d = (left - right)[batch.mask]
    some = torch.tensor(batch.unmasked_lengths) > 0
    metrics = run(batch, behavior, name)[0].metrics.finalize()
    assert metrics["vespo/w_mean"] == pytest.approx(float(log_w[some].exp().mean()))
    assert metrics["vespo/log_w_max"] == pytest.approx(float(log_w[some].max()))
    assert metrics["vespo/ess"] == pytest.approx(
        float(log_w[some].exp().sum() ** 2 / (2 * log_w[some]).exp().sum() / some.sum())
    )
    assert metrics["mismatch/k3"] == pytest.approx(float((d.exp() - 1 - d).mean()))
    moved = (policies["π_θ"] - policies["π_old"])[batch.mask]
    if behavior == "rollout" or name == "dppo_tv":
        assert "staleness/k3" not in metrics
    else:
        assert metrics["staleness/k3"] == pytest.approx(float((moved.exp() - 1 - moved).mean()))


def test_the_page_of_metrics_has_the_table():
    page = markdown()
    for behavior, compared in BEHAVIORS.items():
        row = next(line for line in page.splitlines() if f"`{behavior}`" in line and line.startswith("|"))
        assert f"| {compared.ratio} | {compared.gap} |" in row
        assert compared.ratio in describe(behavior) and compared.gap in describe(behavior)
