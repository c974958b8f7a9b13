"""Train-inference corrections: what they weigh, where they enter, and that they enter once."""

import math

import pytest
import torch

from tests.losses.batches import make_batch
from tests.losses.test_surrogates import run
from vespo_megatron.errors import UserError
from vespo_megatron.losses import CorrectionConfig, PolicyLossConfig, objective_names, policy_loss

CU = torch.tensor([0, 4])
OLD = torch.tensor([-1.0, -2.0, -0.5, -1.5], dtype=torch.float64)


def coefficient(name, gap, correction, drift=0.0, advantage=1.0, mask=None, **hyperparameters):
    """φ per token of one response of four tokens with log π_old − log μ = gap and log π_θ − log π_old = drift."""
    gap = torch.tensor(gap, dtype=torch.float64)
    log_probs = (OLD + drift).requires_grad_()
    output = policy_loss(
        log_probs,
        OLD - gap,
        torch.tensor([advantage]),
        CU,
        name=name,
        old_log_probs=OLD,
        correction=correction,
        mask=mask,
        **hyperparameters,
    )
    return output.coefficient.tolist()


def phi(w):
    return w**2 * math.exp(3 * (1 - w))


def test_an_untruncated_correction_telescopes_to_the_rollout_ratio():
    """Σ log(π_θ/π_old) + Σ log(π_old/μ) = Σ log(π_θ/μ): the same gradient as behaviour mode rollout."""
    for seed in range(3):
        batch = make_batch(seed)
        _, expected = run(batch, "vespo")
        for level in ("token", "sequence"):
            correction = {"name": "tis", "level": level, "cap": 1e30}
            _, found = run(batch, "vespo", behavior="recompute", correction=correction)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_sequence_truncation_enters_w_once_whatever_the_length():
    found = coefficient("vespo", [0.5, 0.5, 0.5, 0.5], {"name": "tis", "level": "sequence", "cap": 1.5})
    assert found == pytest.approx([phi(1.5)] * 4)  # not 1.5**4
    found = coefficient("topr", [0.5] * 4, {"name": "tis", "level": "sequence", "cap": 1.5}, advantage=1.0)
    assert found == pytest.approx([1.5] * 4)
    found = coefficient("reinforce", [0.5] * 4, {"name": "tis", "level": "sequence", "cap": 1.5})
    assert found == pytest.approx([1.5] * 4)


def test_a_cap_below_one_does_not_reach_masked_tokens():
    batch = make_batch(3)
    correction = {"name": "tis", "cap": 0.5, "apply": "before_clip"}
    output, _ = run(batch, "vespo", behavior="recompute", correction=correction)
    ratio = (batch.log_probs - batch.old_log_probs) + (batch.old_log_probs - batch.behavior_log_probs).clamp(
        max=math.log(0.5)
    )
    sums = torch.zeros(batch.num_sequences, dtype=torch.float64)
    expected = sums.index_add(0, batch.segment_ids, torch.where(batch.mask, ratio, 0.0))
    torch.testing.assert_close(output.sequence_log_ratio, expected, rtol=0, atol=1e-12)


def test_token_truncation_enters_w_for_each_token():
    found = coefficient("vespo", [0.5, 0.1, -0.2, 0.9], {"name": "tis", "cap": 1.2})
    w = 1.2 * math.exp(0.1) * math.exp(-0.2) * 1.2
    assert found == pytest.approx([phi(w)] * 4)


def test_an_icepop_token_leaves_s_and_has_no_gradient_and_does_not_empty_the_response():
    found = coefficient("vespo", [0.1, 3.0, -3.0, 0.2], {"name": "icepop"}, drift=0.05)
    w = math.exp(0.1 + 0.2 + 2 * 0.05)
    assert found == pytest.approx([phi(w), 0.0, 0.0, phi(w)])


def test_after_clip_weighs_phi_and_before_clip_weighs_the_ratio_phi_sees():
    gap, drift = [0.2, -0.1, 0.6, 0.0], 0.1
    weights = [min(math.exp(g), 1.5) for g in gap]
    ratio = math.exp(drift)
    after = coefficient("grpo", gap, {"name": "tis", "cap": 1.5}, drift)
    assert after == pytest.approx([ratio * w for w in weights])
    before = coefficient("grpo", gap, {"name": "tis", "cap": 1.5, "apply": "before_clip"}, drift)
    assert before == pytest.approx([ratio * w if ratio * w <= 1.28 else 0.0 for w in weights])
    assert coefficient("grpo", gap, {"name": "tis", "cap": 1.5, "apply": "after_clip"}, drift) == after


@pytest.mark.parametrize(
    ("correction", "kept"),
    [
        ({"name": "mis", "low": 0.5, "high": 2.0}, False),  # product e^0.8
        ({"name": "mis", "low": 0.5, "high": 2.3}, True),
        ({"name": "geometric", "low": 0.9, "high": 1.2}, False),  # mean e^0.2 = 1.2214
        ({"name": "geometric", "low": 0.9, "high": 1.23}, True),
        ({"name": "veto", "veto_threshold": 0.5}, False),
        ({"name": "veto", "veto_threshold": 0.3}, True),
        ({"name": "tis", "veto_threshold": 0.5, "cap": 100.0}, False),
    ],
)
def test_rejection_drops_the_whole_response(correction, kept):
    found = coefficient("reinforce", [1.0, -1.0, 0.4, 0.4], correction)
    assert found == [1.0 if kept else 0.0] * 4


def test_masked_tokens_neither_reject_nor_weigh():
    mask = torch.tensor([True, False, True, True])
    found = coefficient("reinforce", [0.0, math.nan, 0.1, 0.1], {"name": "mis", "high": 1.3}, mask=mask)
    assert found == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("name", objective_names())
def test_a_combination_that_means_nothing_is_refused_with_the_reason(name):
    tis = CorrectionConfig("tis")
    with pytest.raises(UserError, match=r"count the mismatch twice|there is no π_old"):
        PolicyLossConfig(name, behavior="rollout", correction=tis)
    if name in ("minirl", "decoupled_ppo"):
        with pytest.raises(UserError, match="behavior=recompute"):
            PolicyLossConfig(name, behavior="rollout")
        with pytest.raises(UserError, match="part of the objective"):
            PolicyLossConfig(name, behavior="recompute", correction=tis)
    elif name.startswith("dppo"):
        with pytest.raises(UserError, match="already π_θ/μ"):
            PolicyLossConfig(name, behavior="recompute", correction=tis)
    elif name == "vespo":
        with pytest.raises(UserError, match="enters W once"):
            PolicyLossConfig(name, behavior="recompute", correction=CorrectionConfig("tis", apply="after_clip"))
    else:
        PolicyLossConfig(name, behavior="recompute", correction=tis)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"name": "icepp"}, "nearest is 'icepop'"),
        ({"name": "tis", "capp": 2}, "nearest is 'cap'"),
        ({"name": "tis", "level": "sequnce"}, "nearest is 'sequence'"),
        ({"name": "tis", "apply": "after"}, "nearest is 'after_clip'"),
        ({"name": "icepop", "level": "sequence"}, "means nothing to icepop"),
        ({"name": "mis", "low": 3.0}, "0 ≤ low < high"),
        ({"name": "veto"}, "no threshold"),
        ({"name": "tis", "cap": 0}, "positive weight"),
        ({"cap": 2}, "has no name"),
    ],
)
def test_a_wrong_correction_key_is_named_with_its_nearest(mapping, message):
    with pytest.raises(UserError, match=message):
        CorrectionConfig.from_mapping(mapping)
