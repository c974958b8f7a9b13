"""A hyperparameter's value that means nothing is one clear error; one that is taken gives a finite gradient."""

import math
import re
import types
import typing
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.losses.batches import make_batch
from vespo_megatron.errors import UserError
from vespo_megatron.losses import LossInputs, PolicyLossConfig, compute_policy_loss, get_objective, objective_names
from vespo_megatron.losses.hyperparameters import COMMON, LARGEST, NEEDED, ORDERED, VALUES, Choice, Flag, Number
from vespo_megatron.losses.theory import objective_phi
from vespo_megatron.recipe import schema

EVERY = [(name, key) for name in objective_names() for key in [*get_objective(name).hyperparameters, *COMMON]]
SEARCHED = {"ratio_low": 0.8, "ratio_high": 1.2, "mean_advantage": 0.0, "mean_log_prob": -1.0}
SEARCHED |= {"lot_max": 0.5, "cov_min": 1.0}
NEVER = ("0.2", "", math.nan, 1e300, [0.2], {}, torch.zeros(2), 1j)
"""Values that nothing in a loss can have."""


def config(name, **hyperparameters):
    behavior = "recompute" if get_objective(name).anchor == "old" or "opsm_anchor" in hyperparameters else "rollout"
    return PolicyLossConfig(name, hyperparameters, behavior=behavior)


def refused(name, key, value):
    with pytest.raises(UserError, match=rf"^loss_fn\.hyperparameters\.{key}: ") as caught:
        config(name, **{key: value})
    return caught.value


def edges(rule):
    """The smallest, the largest and other values that a rule accepts."""
    if isinstance(rule, Flag):
        return [True, False]
    if isinstance(rule, Choice):
        return list(rule.names)
    low = max(rule.low * (1 + 1e-6), 1e-30) if rule.above else max(rule.low, -LARGEST)
    high = [LARGEST, math.inf] if rule.high == math.inf else [rule.high]
    return [low, *high, *([None] if rule.null else [])]


@pytest.mark.parametrize("name", objective_names())
def test_every_hyperparameter_has_a_row_that_agrees_with_its_type_and_takes_its_default(name):
    objective = get_objective(name)
    hints = typing.get_type_hints(objective.phi)
    for key, default in objective.hyperparameters.items():
        rule = VALUES[key]
        parts = typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
        kind = {Number: float, Flag: bool, Choice: str}[type(rule)]
        assert kind in parts
        assert getattr(rule, "null", False) == (type(None) in parts)
        assert getattr(rule, "tensor", False) == (torch.Tensor in parts)
        assert rule.accepts(default)


def test_no_row_is_of_a_hyperparameter_that_no_objective_has():
    assert {key for _, key in EVERY} == set(VALUES)
    assert {key for pair in ORDERED for key in pair} <= set(VALUES)


@pytest.mark.parametrize(("name", "key"), EVERY)
def test_a_value_that_means_nothing_is_refused_by_its_key(name, key):
    rule = VALUES[key]
    wrong = [*NEVER, *([] if getattr(rule, "null", False) else [None])]
    wrong += [] if isinstance(rule, Flag) else [True]
    if isinstance(rule, Number) and rule.low > -math.inf:
        wrong += [rule.low - 0.1, -math.inf, *([rule.low] if rule.above else [])]
    if isinstance(rule, Number) and rule.high < math.inf:
        wrong += [rule.high * 1.01, math.inf]
    for value in wrong:
        error = refused(name, key, value)
        assert error.expected and "\n" not in error.what


@pytest.mark.parametrize(("name", "key"), EVERY)
def test_every_value_that_is_taken_gives_finite_numbers_in_float32(name, key):
    batch = make_batch(6)
    inputs = LossInputs(
        batch.log_probs.float(),
        batch.behavior_log_probs.float(),
        batch.advantages.float(),
        batch.cu_seqlens,
        batch.mask,
        old_log_probs=batch.old_log_probs.float(),
        entropy=-batch.old_log_probs.float(),
    )
    for value in edges(VALUES[key]):
        given = {key: value} | ({NEEDED[key]: 0.5} if key in NEEDED else {})
        if key in SEARCHED:
            known = {other: SEARCHED[other] for other in SEARCHED if other in get_objective(name).hyperparameters}
            given = dict.fromkeys(known) if value is None else {**known, **given}
        for pair in ORDERED:  # the other end of a range goes where this one does
            if key in pair and set(pair) <= set(get_objective(name).hyperparameters):
                other = pair[1 - pair.index(key)]
                given |= {other: value} if value is not None and VALUES[other].accepts(value) else {}
        log_probs = inputs.log_probs.clone().requires_grad_()
        compute_policy_loss(replace(inputs, log_probs=log_probs), config(name, **given)).loss.backward()
        assert log_probs.grad.isfinite().all(), given


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("cispo", {"ratio_min": 6.0}, "ratio_min: is 6.0, and ratio_max is 5.0"),
        ("cispo", {"ratio_min": 2.0, "ratio_max": 1.5}, "ratio_min: is 2.0, and ratio_max is 1.5"),
        ("maspo", {"sigma_max": 0.5}, "sigma_max: is 0.5, and sigma_base is 1.0"),
        ("maspo", {"risk_min": 11.0}, "risk_min: is 11.0, and risk_max is 10.0"),
        ("bapo", {"low_start": 0.95}, "low_start: is 0.95, and low_max is 0.9"),
        ("bapo", {"high_max": 1.1}, "high_max: is 1.1, and high_start is 1.2"),
        ("bapo", {"ratio_low": 1.3, "ratio_high": 1.4}, "ratio_low: is 1.3"),
        ("clip_cov", {"cov_low": 6.0}, "cov_low: is 6.0, and cov_high is 5.0"),
        ("clip_cov", {"lot_max": 0.5}, "lot_max: is given without mean_advantage and mean_log_prob"),
        ("kl_cov", {"mean_advantage": 0.5, "cov_min": 1}, "mean_advantage: is given without mean_log_prob"),
        ("bapo", {"ratio_low": 0.8, "ratio_high": None}, "ratio_low: is given without ratio_high"),
        ("vespo", {"normalization": "sqr"}, "normalization: unknown normalization 'sqr'; the nearest is 'sqrt'"),
        ("grpo", {"clip_low": -0.1}, "clip_low: is -0.1\n  expected: a number of at least 0 and at most 1"),
        ("grpo", {"clip_high": None}, "clip_high: is null"),
        ("grpo", {"dual_clip": "3"}, "dual_clip: is the text '3'\n  expected: a number above 1, or null"),
        ("topr", {"length_normalized": 1}, "length_normalized: is 1\n  expected: true or false"),
        ("grpo", {"opsm_delta": -0.1}, "opsm_delta: is -0.1"),
        ("grpo", {"clip_low": torch.tensor(0.2)}, "clip_low: is a Tensor"),
        ("vespo", {"entropy_min": 0.5}, "entropy_min: is given without top_entropy_fraction"),
        ("grpo", {"opsm_anchor": "old"}, "opsm_anchor: is given without opsm_delta"),
    ],
)
def test_what_is_wrong_is_said(name, given, message):
    with pytest.raises(UserError, match=f"^{re.escape(f'loss_fn.hyperparameters.{message}')}"):
        config(name, **given)


@pytest.mark.parametrize("name", ["bapo", "m2po", "clip_cov", "kl_cov"])
def test_null_for_what_is_found_of_a_mini_batch_still_has_it_found(name):
    known = [key for key in get_objective(name).hyperparameters if getattr(VALUES[key], "tensor", False)]
    assert config(name).searches
    assert config(name, **dict.fromkeys(known)).searches
    assert config(name, **dict.fromkeys(known, 1.0)).searches == []


def test_null_for_the_least_entropy_has_it_found():
    assert config("grpo", top_entropy_fraction=0.5, entropy_min=None).searches
    assert config("grpo", top_entropy_fraction=0.5, entropy_min=1.0).searches == []


def test_hyperparameters_that_are_no_names_and_values_are_refused():
    for given in (None, [("clip_low", 0.2)], "clip_low"):
        with pytest.raises(UserError, match=r"^loss_fn\.hyperparameters: is a "):
            PolicyLossConfig("grpo", given)


def test_numbers_of_other_kinds_are_numbers():
    for value in (np.float32(0.25), np.float64(0.25), 0, 1):
        config("grpo", clip_low=value)
    config("bapo", ratio_low=torch.tensor(0.8), ratio_high=torch.tensor(1.2))


def test_a_function_of_the_users_own_means_what_it_wants_by_a_name():
    def reversed_clip(ratios, *, clip_low=-1.0):
        return clip_low * ratios.log_ratio.exp()

    PolicyLossConfig(reversed_clip, {"clip_low": -5.0})
    with pytest.raises(UserError, match="opsm_delta: is -1"):
        PolicyLossConfig(reversed_clip, {"opsm_delta": -1})
    with pytest.raises(UserError, match="entropy_min: is given without top_entropy_fraction"):
        PolicyLossConfig(reversed_clip, {"entropy_min": 0.5})


def test_null_for_a_part_leaves_what_belongs_to_it_without_effect_and_is_no_mistake():
    config("grpo", opsm_delta=None, opsm_anchor="old")
    config("grpo", entropy_min=None)


def test_the_calculator_and_the_recipe_check_the_same():
    given = {"name": "grpo", "hyperparameters": {"clip_low": -0.1}}
    with pytest.raises(UserError, match=r"^loss_fn\.hyperparameters\.clip_low: is -0.1"):
        PolicyLossConfig.from_recipe(schema.LossConfig().with_values(given), "rollout")
    with pytest.raises(UserError, match=r"^hyperparameters\.clip_low: is -0.1"):
        objective_phi("grpo", torch.tensor([0.5]), positive=True, clip_low=-0.1)
