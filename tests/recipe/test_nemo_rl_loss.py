"""NeMo-RL's loss with its switches, written out apart, has the gradient of the recipe that it becomes."""

import math

import pytest
import torch

from tests.losses.batches import loss_inputs, make_batch
from vespo_megatron.losses import CorrectionConfig, PolicyLossConfig, compute_policy_loss
from vespo_megatron.recipe.nemo_rl_loss import DEFAULTS, objective

SEQUENCE = {"sequence_level_importance_ratios": True, "token_level_loss": False}
CORRECTED = {"use_importance_sampling_correction": True}
SWITCHES = {
    "default": {},
    "dual clip": {"ratio_clip_c": 3.0, "ratio_clip_max": 0.28},
    "per sequence mean": {"token_level_loss": False},
    "gspo": {**SEQUENCE, "ratio_clip_min": 3e-2, "ratio_clip_max": 4e-2},
    "gspo with dual clip": {**SEQUENCE, "ratio_clip_c": 1.1},
    "cispo": {"use_cispo": True, "ratio_clip_max": 4.0, "ratio_clip_min": 1.0},
    "on policy": {"force_on_policy_ratio": True},
    "no ratio": {"disable_ppo_ratio": True, "token_level_loss": False},
    "correction": CORRECTED,
    "correction of gspo": {**SEQUENCE, **CORRECTED},
    "tis": {**CORRECTED, "truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": 1.1},
    "tis, two bounds": {
        **CORRECTED,
        "truncated_importance_sampling_type": "tis",
        "truncated_importance_sampling_ratio": 1.1,
        "truncated_importance_sampling_ratio_min": 0.95,
    },
    "icepop": {
        **CORRECTED,
        "truncated_importance_sampling_type": "icepop",
        "truncated_importance_sampling_ratio": 1.1,
        "truncated_importance_sampling_ratio_min": 0.9,
    },
    "seq-mask-tis": {
        **CORRECTED,
        "truncated_importance_sampling_type": "seq-mask-tis",
        "truncated_importance_sampling_ratio": 1.05,
        "truncated_importance_sampling_ratio_min": 0.95,
    },
}


def theirs(batch, switches):
    """ClippedPGLossFn on one response at a time: the gradient of log π_θ, [tokens]."""
    set_to = {**DEFAULTS, **switches}
    log_probs = batch.leaf()
    responses = [((batch.segment_ids == row) & batch.mask).nonzero()[:, 0] for row in range(batch.num_sequences)]
    responses = [tokens for tokens in responses if len(tokens)]
    total = sum(len(tokens) for tokens in responses)
    loss = torch.zeros((), dtype=torch.float64)
    for tokens in responses:
        current, previous = log_probs[tokens], batch.old_log_probs[tokens]
        gap = previous - batch.behavior_log_probs[tokens]
        advantage = batch.advantages[batch.segment_ids[tokens[0]]]
        ratio = _ratio(current, previous, set_to)
        clipped = ratio.clamp(1 - set_to["ratio_clip_min"], 1 + set_to["ratio_clip_max"])
        if set_to["force_on_policy_ratio"] or set_to["disable_ppo_ratio"]:
            clipped = ratio
        if set_to["use_cispo"]:
            value = -advantage * clipped.detach() * current
        else:
            value = torch.maximum(-advantage * ratio, -advantage * clipped)
        if set_to["ratio_clip_c"] is not None and advantage < 0:
            value = torch.minimum(value, -advantage * set_to["ratio_clip_c"] * torch.ones_like(value))
        value = value * _weight(gap, set_to)
        if set_to["token_level_loss"]:
            loss = loss + value.sum() / total
        else:
            loss = loss + value.mean() / len(responses)
    loss.backward()
    return log_probs.grad


def _ratio(current, previous, set_to):
    if set_to["force_on_policy_ratio"]:
        return (current - current.detach()).exp()
    if set_to["disable_ppo_ratio"]:
        return current
    if set_to["sequence_level_importance_ratios"]:
        return (current - previous).mean().exp().repeat(len(current))
    return (current - previous).exp()


def _weight(gap, set_to):
    """1, or e^gap per token, or one e^Σgap for the whole response; truncated or filtered."""
    if not set_to["use_importance_sampling_correction"]:
        return torch.ones_like(gap)
    weight = gap.sum().exp().repeat(len(gap)) if set_to["sequence_level_importance_ratios"] else gap.exp()
    kind = set_to["truncated_importance_sampling_type"]
    high, low = set_to["truncated_importance_sampling_ratio"], set_to["truncated_importance_sampling_ratio_min"]
    if kind == "tis":
        return weight.clamp(low or 0.0, high)
    if kind == "icepop":
        return torch.where((weight >= low) & (weight <= high), weight, 0.0)
    if kind == "seq-mask-tis":
        return weight * float(low <= math.exp(float(gap.mean())) <= high)
    return weight


@pytest.mark.parametrize("label", SWITCHES)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_recipe_that_carries_over_has_their_gradient(label, seed):
    batch = make_batch(seed, scale=0.1)
    theirs_says = {"use_cispo": False, **SWITCHES[label]}
    ours = objective({f"loss_fn.{name}": value for name, value in theirs_says.items()})
    config = PolicyLossConfig(
        ours["loss_fn.name"],
        ours["loss_fn.hyperparameters"],
        aggregation=ours["loss_fn.aggregation"],
        behavior=ours["loss_fn.behavior"],
        correction=CorrectionConfig.from_mapping(ours.get("loss_fn.correction")),
    )
    leaf = batch.leaf()
    inputs = loss_inputs(batch, leaf)
    compute_policy_loss(inputs, config).loss.backward()
    expected = theirs(batch, SWITCHES[label])
    expected[~batch.mask] = 0.0
    assert expected.any()
    # Exactly on a bound their maximum halves the gradient; ours has all of it.
    differ = (leaf.grad - expected).abs() > 1e-10
    assert int(differ.sum()) <= 4, int(differ.sum())
    assert not (differ & ((leaf.grad - 2 * expected).abs() > 1e-10)).any()


def test_a_file_without_an_objective_has_their_default():
    ours = objective({"loss_fn.reference_policy_kl_penalty": 0.1})
    assert ours["loss_fn.name"] == "grpo" and ours["loss_fn.hyperparameters"]["dual_clip"] is None
