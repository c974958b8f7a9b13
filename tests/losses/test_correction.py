"""Train-inference corrections: what they weigh, where they enter, and that they enter once."""

import math

import pytest
import torch

from tests.losses.batches import make_batch
from tests.losses.test_surrogates import run
from vespo_megatron.errors import UserError
from vespo_megatron.losses import (
    CorrectionConfig,
    PolicyLossConfig,
    Rejection,
    get_objective,
    objective_names,
    policy_loss,
)
from vespo_megatron.losses.config import BEHAVIORS

CU = torch.tensor([0, 4])
OLD = torch.tensor([-5.0, -6.0, -4.5, -5.5], dtype=torch.float64)


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
            correction = {"weight": "tis", "level": level, "high": 1e30}
            _, found = run(batch, "vespo", behavior="recompute", correction=correction)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_sequence_truncation_enters_w_once_whatever_the_length():
    found = coefficient("vespo", [0.5, 0.5, 0.5, 0.5], {"weight": "tis", "level": "sequence", "high": 1.5})
    assert found == pytest.approx([phi(1.5)] * 4)  # not 1.5**4
    found = coefficient("topr", [0.5] * 4, {"weight": "tis", "level": "sequence", "high": 1.5}, advantage=1.0)
    assert found == pytest.approx([1.5] * 4)
    found = coefficient("reinforce", [0.5] * 4, {"weight": "tis", "level": "sequence", "high": 1.5})
    assert found == pytest.approx([1.5] * 4)


def test_a_cap_below_one_does_not_reach_masked_tokens():
    batch = make_batch(3)
    correction = {"weight": "tis", "high": 0.5, "apply": "before_clip"}
    output, _ = run(batch, "vespo", behavior="recompute", correction=correction)
    ratio = (batch.log_probs - batch.old_log_probs) + (batch.old_log_probs - batch.behavior_log_probs).clamp(
        max=math.log(0.5)
    )
    sums = torch.zeros(batch.num_sequences, dtype=torch.float64)
    expected = sums.index_add(0, batch.segment_ids, torch.where(batch.mask, ratio, 0.0))
    torch.testing.assert_close(output.sequence_log_ratio, expected, rtol=0, atol=1e-12)


def test_token_truncation_enters_w_for_each_token():
    found = coefficient("vespo", [0.5, 0.1, -0.2, 0.9], {"weight": "tis", "high": 1.2})
    w = 1.2 * math.exp(0.1) * math.exp(-0.2) * 1.2
    assert found == pytest.approx([phi(w)] * 4)


def test_an_icepop_token_leaves_s_and_has_no_gradient_and_does_not_empty_the_response():
    found = coefficient("vespo", [0.1, 3.0, -3.0, 0.2], {"weight": "icepop"}, drift=0.05)
    w = math.exp(0.1 + 0.2 + 2 * 0.05)
    assert found == pytest.approx([phi(w), 0.0, 0.0, phi(w)])


def test_after_clip_weighs_phi_and_before_clip_weighs_the_ratio_phi_sees():
    gap, drift = [0.2, -0.1, 0.6, 0.0], 0.1
    weights = [min(math.exp(g), 1.5) for g in gap]
    ratio = math.exp(drift)
    after = coefficient("grpo", gap, {"weight": "tis", "high": 1.5}, drift)
    assert after == pytest.approx([ratio * w for w in weights])
    before = coefficient("grpo", gap, {"weight": "tis", "high": 1.5, "apply": "before_clip"}, drift)
    assert before == pytest.approx([ratio * w if ratio * w <= 1.28 else 0.0 for w in weights])
    assert coefficient("grpo", gap, {"weight": "tis", "high": 1.5, "apply": "after_clip"}, drift) == after


def rejecting(statistic="k1", level="sum", low=None, high=None):
    return {"reject": [{"statistic": statistic, "level": level, "low": low, "high": high}]}


@pytest.mark.parametrize(
    ("correction", "kept"),
    [
        (rejecting(low=0.5, high=2.0), False),  # product e^0.8
        (rejecting(low=0.5, high=2.3), True),
        (rejecting(level="mean", low=0.9, high=1.2), False),  # mean e^0.2 = 1.2214
        (rejecting(level="mean", low=0.9, high=1.23), True),
        (rejecting(level="max", high=2.7), False),  # largest w e = 2.718
        (rejecting(level="max", low=0.36, high=2.72), True),
        (rejecting("k2", "sum", high=1.15), False),  # (1 + 1 + .16 + .16)/2 = 1.16
        (rejecting("k2", "sum", high=1.17), True),
        (rejecting("k3", "mean", high=0.3), False),  # (.7183 + .3679 + 2·.0918)/4 = .3175
        (rejecting("k3", "mean", high=0.32), True),
        (rejecting("k3", "max", high=0.71), False),
        (rejecting("k3", "max", high=0.72), True),
        ({"veto": 0.5}, False),
        ({"veto": 0.3}, True),
        ({"weight": "tis", "veto": 0.5, "high": 100.0}, False),
        ({"reject": [*rejecting(high=2.3)["reject"], *rejecting("k3", "max", high=0.71)["reject"]]}, False),
    ],
)
def test_rejection_drops_the_whole_response_and_weighs_nothing(correction, kept):
    found = coefficient("reinforce", [1.0, -1.0, 0.4, 0.4], correction)
    assert found == [1.0 if kept else 0.0] * 4


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (rejecting("k1", "token", 0.5, 1.5), [0, 0, 1, 1]),
        (rejecting("k2", "token", high=0.1), [0, 0, 1, 1]),
        (rejecting("k3", "token", high=0.5), [0, 1, 1, 1]),  # k3 of −1 is .368, of 1 is .718
        (rejecting("k3", "token", low=0.1), [1, 1, 0, 0]),
    ],
)
def test_rejection_of_tokens_drops_those_tokens(rule, kept):
    assert coefficient("reinforce", [1.0, -1.0, 0.4, 0.4], rule) == kept


def test_masked_tokens_neither_reject_nor_weigh():
    mask = torch.tensor([True, False, True, True])
    for rule in (rejecting(high=1.3), rejecting(level="max", low=0.9, high=1.2), rejecting("k3", "max", high=0.1)):
        found = coefficient("reinforce", [0.0, math.nan, 0.1, 0.1], rule, mask=mask)
        assert found == [1.0, 0.0, 1.0, 1.0]
    # Bounds that do not hold one: a masked token's w of one is out of them, and is not looked at.
    found = coefficient("reinforce", [0.4, math.nan, 0.4, 0.4], rejecting(level="max", low=1.2), mask=mask)
    assert found == [1.0, 0.0, 1.0, 1.0]


def test_mis_keeps_the_weight_inside_the_bounds():
    """TRL's, slime's and verl's: what is inside is weighted, what is outside is dropped."""
    gap = [0.4, -0.1, 0.9, -1.2]
    found = coefficient("reinforce", gap, {"weight": "mis", "low": 0.5, "high": 2.0})
    assert found == pytest.approx([math.exp(0.4), math.exp(-0.1), 0.0, 0.0])
    inside = coefficient("reinforce", [0.2, 0.1, 0.0, 0.1], {"weight": "mis", "level": "sequence"})
    assert inside == pytest.approx([math.exp(0.4)] * 4)
    assert coefficient("reinforce", [0.2] * 4, {"weight": "mis", "level": "sequence"}) == [0.0] * 4  # e^.8 > 2


def test_the_denominator_counts_what_is_kept_or_everything():
    """Two responses of four and two tokens; the second is rejected."""
    old = torch.cat([OLD, OLD[:2]])
    gap = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    for denominator, aggregation, expected in (
        ("fixed", "token-mean", 1 / 6),
        ("kept", "token-mean", 1 / 4),
        ("fixed", "seq-mean-token-sum", 1 / 2),
        ("kept", "seq-mean-token-sum", 1.0),
        ("fixed", "seq-mean-token-mean", 1 / 8),
        ("kept", "seq-mean-token-mean", 1 / 4),
    ):
        leaf = old.clone().requires_grad_()
        policy_loss(
            leaf,
            old - gap,
            torch.ones(2),
            torch.tensor([0, 4, 6]),
            name="reinforce",
            old_log_probs=old,
            aggregation=aggregation,
            correction={**rejecting(high=2.0), "denominator": denominator},
        ).loss.backward()
        assert (-leaf.grad).tolist() == pytest.approx([expected] * 4 + [0.0] * 2)


@pytest.mark.parametrize("name", objective_names())
def test_a_weight_that_means_nothing_is_refused_with_the_reason_and_a_rejection_never(name):
    tis, rejection = CorrectionConfig("tis"), CorrectionConfig(reject=(Rejection(high=2.0),))
    behaviors = ("recompute", "version") if name in ("minirl", "decoupled_ppo") else BEHAVIORS
    for behavior in behaviors:
        PolicyLossConfig(name, behavior=behavior, correction=rejection)
    if name in ("minirl", "decoupled_ppo"):
        with pytest.raises(UserError, match="behavior=recompute"):
            PolicyLossConfig(name, behavior="rollout")
        with pytest.raises(UserError, match="part of the objective"):
            PolicyLossConfig(name, behavior="recompute", correction=tis)
        return
    if get_objective(name).uses_ratio:
        with pytest.raises(UserError, match=r"would count it twice|count the mismatch twice"):
            PolicyLossConfig(name, behavior="rollout", correction=tis)
    else:
        PolicyLossConfig(name, behavior="rollout", correction=tis)
    if name.startswith("dppo"):
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
        ({"weight": "icepp"}, "nearest is 'icepop'"),
        ({"weight": "tis", "hgh": 2}, "nearest is 'high'"),
        ({"weight": "tis", "level": "sequnce"}, "nearest is 'sequence'"),
        ({"weight": "tis", "apply": "after"}, "nearest is 'after_clip'"),
        ({"weight": "tis", "denominator": "keptt"}, "nearest is 'kept'"),
        ({"weight": "icepop", "level": "sequence"}, "icepop weighs tokens"),
        ({"weight": "mis", "low": 3.0}, "0 ≤ low < high"),
        ({"weight": "tis", "high": 0}, "0 ≤ low < high"),
        ({"weight": "tis", "high": math.nan}, "a number of at least 0"),
        ({"weight": "tis", "high": "2"}, "a number of at least 0"),
        ({"weight": "tis", "low": -0.1}, "a number of at least 0"),
        ({"veto": -1.0}, "a number of at least 0"),
        ({"high": 2}, "is of a weight, and there is none"),
        ({"normalize": True, "veto": 0.1}, "is of a weight, and there is none"),
        ({"denominator": "kept"}, "neither weighs nor rejects"),
        ({"reject": [{"level": "sum"}]}, "a rule has no bound"),
        ({"reject": [{"level": "summ", "high": 2}]}, "nearest is 'sum'"),
        ({"reject": [{"statistic": "k4", "high": 2}]}, "nearest is 'k3'"),
        ({"reject": [{"hihg": 2}]}, "nearest is 'high'"),
        ({"reject": {"low": 2.0, "high": 0.5}}, "0 ≤ low < high"),
        ({"name": "tis", "cap": 2.0}, "it is called weight"),
        ({"weight": "tis", "cap": 2.0}, "it is called high"),
        ({"veto_threshold": 1e-4}, "it is called veto"),
    ],
)
def test_a_wrong_correction_key_is_named_with_what_it_should_be(mapping, message):
    with pytest.raises(UserError, match=message):
        CorrectionConfig.from_mapping(mapping)
