"""Bad input is an error that names the thing, or is dropped and counted; and the library stands on torch alone."""

import math
import subprocess
import sys

import pytest
import torch

from tests.losses.batches import make_batch
from vespo_megatron.errors import UserError
from vespo_megatron.losses import (
    LossInputs,
    Normalizer,
    PolicyLossConfig,
    compute_policy_loss,
    get_objective,
    objective_names,
    policy_loss,
)
from vespo_megatron.losses.sequence import PackedSequences

ALONE = [n for n in objective_names() if get_objective(n).anchor != "old" and not get_objective(n).search]
"""Objectives that need no π_old and look at no other sequence."""


def call(batch, **changes):
    given = {
        "log_probs": batch.leaf(),
        "behavior_log_probs": batch.behavior_log_probs,
        "advantages": batch.advantages,
        "cu_seqlens": batch.cu_seqlens,
        "mask": batch.mask,
    } | changes
    return policy_loss(**given)


def poisoned(where, value):
    batch = make_batch(6)
    spots = {i: int((((batch.segment_ids == i) & batch.mask).nonzero())[0]) for i in (3, 6)}
    if where == "advantages":
        batch.advantages[3] = batch.advantages[6] = value
    else:
        for spot in spots.values():
            getattr(batch, where)[spot] = value
    return batch


@pytest.mark.parametrize("where", ["log_probs", "behavior_log_probs", "advantages"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["vespo", "grpo"])
def test_a_number_that_is_not_finite_is_an_error_naming_the_samples(where, value, name):
    batch = poisoned(where, value)
    with pytest.raises(UserError, match="sequence 3, sequence 6"):
        call(batch, name=name)
    output = compute_policy_loss(
        LossInputs(batch.leaf(), batch.behavior_log_probs, batch.advantages, batch.cu_seqlens, batch.mask),
        PolicyLossConfig(name),
    )
    with pytest.raises(UserError, match=r"sample a3, a6: has a log-prob or an advantage that is not finite"):
        output.raise_if_bad([f"a{i}" for i in range(batch.num_sequences)])


@pytest.mark.parametrize("where", ["log_probs", "behavior_log_probs", "advantages"])
@pytest.mark.parametrize("name", ALONE)
def test_under_drop_the_bad_samples_are_left_out_and_counted_and_the_rest_is_as_if_they_were_not_there(where, name):
    clean, batch = make_batch(6), poisoned(where, torch.nan)
    counts = {"num_tokens": int(clean.mask.sum())}
    log_probs = batch.leaf()
    output = call(batch, log_probs=log_probs, name=name, on_bad_sample="drop", **counts)
    output.loss.backward()
    reference = clean.leaf()
    call(clean, log_probs=reference, name=name, **counts).loss.backward()
    bad = (batch.segment_ids == 3) | (batch.segment_ids == 6)
    torch.testing.assert_close(log_probs.grad[~bad], reference.grad[~bad], rtol=0, atol=1e-14)
    assert not log_probs.grad[bad].any() and not output.coefficient[bad].any()
    assert output.loss.isfinite()
    metrics = output.metrics.finalize()
    assert metrics["loss/bad_samples"] == 2
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"behavior_log_probs": torch.zeros(3)}, r"behavior_log_probs: has shape \(3,\)"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask: has shape \(3,\)"),
        ({"advantages": torch.zeros(5)}, r"advantages: has shape \(5,\)"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 63])}, "no offsets of 63 packed tokens"),
        ({"cu_seqlens": torch.tensor([0, 5, 62])}, "no offsets of 63 packed tokens"),
        ({"cu_seqlens": torch.tensor([1, 63])}, "no offsets of 63 packed tokens"),
        ({"cu_seqlens": torch.zeros(2, 2, dtype=torch.int64)}, "cu_seqlens: has shape"),
        ({"name": "vepso"}, "unknown objective 'vepso'; the nearest is 'vespo'"),
        ({"name": "grpo", "cliplow": 0.1}, "unknown hyperparameter 'cliplow'; the nearest is 'clip_low'"),
        ({"c1_poss": 0.1}, "nearest is 'c1_pos'"),
        ({"normalization": "sqr"}, "nearest is 'sqrt'"),
        ({"c1_pos": -0.1}, "loss_fn.hyperparameters.c1_pos: is -0.1"),
        ({"aggregation": "token_mean"}, "nearest is 'token-mean'"),
        ({"aggregation": "token-sum-norm"}, "aggregation_length"),
        ({"name": "bapo", "ratio_low": 0.8}, "ratio_low: is given without ratio_high"),
        ({"name": "no.such.module:phi"}, "cannot load 'no.such.module:phi'"),
        ({"name": "math:pi"}, "is no objective"),
        ({"aggregation": "seq-mean-token-sum", "num_tokens": 3}, "fixes the denominator of token-mean alone"),
        ({"on_bad_sample": "dropp"}, "nearest is 'drop'"),
        ({"log_probs": [-1.0]}, "log_probs: is a list"),
        ({"log_probs": torch.tensor(-1.0)}, r"log_probs: has shape \(\)"),
        ({"log_probs": -torch.ones(3, 21)}, r"(?s)log_probs: has shape \(3, 21\).*losses.pack"),
        ({"log_probs": -torch.ones(63, dtype=torch.int64)}, "log_probs: is of torch.int64"),
        ({"behavior_log_probs": None}, "behavior_log_probs: is a NoneType"),
        ({"behavior_log_probs": torch.full((63,), 0.5)}, "behavior_log_probs: holds 0.5"),
        ({"behavior_log_probs": torch.zeros(63, device="meta")}, "behavior_log_probs: is on meta"),
        ({"old_log_probs": torch.zeros(63, 1)}, r"old_log_probs: has shape \(63, 1\)"),
        ({"advantages": [1.0] * 9}, "advantages: is a list"),
        ({"advantages": None}, "advantages: is a NoneType"),
        ({"advantages": torch.ones(9, dtype=torch.int64)}, "advantages: is of torch.int64"),
        ({"cu_seqlens": [0, 63]}, "cu_seqlens: is a list"),
        ({"cu_seqlens": torch.tensor([0.0, 63.0])}, "cu_seqlens: is of torch.float32"),
        ({"cu_seqlens": torch.tensor(63)}, "cu_seqlens: has shape"),
        ({"cu_seqlens": torch.tensor([0, 63], device="meta")}, "cu_seqlens: is on meta"),
        ({"mask": torch.rand(63)}, "mask: is of torch.float32"),
        ({"mask": torch.ones(63, dtype=torch.int64)}, "mask: is of torch.int64"),
        ({"positions": torch.zeros(63)}, "positions: is of torch.float32"),
        ({"num_tokens": 0}, "num_tokens: is 0"),
        ({"num_tokens": -3}, "num_tokens: is -3"),
        ({"advantage_level": "tokn"}, "nearest is 'token'"),
        ({"aggregation": "token-sum-norm", "aggregation_length": 0}, "aggregation_length"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    with pytest.raises(UserError, match=message):
        call(make_batch(0), **change)


def test_advantages_that_could_be_either_are_an_error_until_the_level_is_said():
    log_probs, behavior, advantages = torch.zeros(2), torch.ones(2), torch.tensor([1.0, 3.0])
    cu = torch.tensor([0, 0, 2])
    with pytest.raises(UserError, match="may be one per sequence or one per token"):
        policy_loss(log_probs, behavior, advantages, cu)
    for level, expected in (("sequence", [3.0, 3.0]), ("token", [1.0, 3.0])):
        leaf = log_probs.clone().requires_grad_()
        inputs = LossInputs(leaf, behavior, advantages, cu, advantage_level=level)
        compute_policy_loss(inputs, PolicyLossConfig("reinforce"), Normalizer(1, 1)).loss.backward()
        assert leaf.grad.tolist() == [-x for x in expected]


def test_an_input_the_config_asks_for_is_named_when_missing():
    batch = make_batch(0)
    inputs = LossInputs(batch.leaf(), batch.behavior_log_probs, batch.advantages, batch.cu_seqlens, batch.mask)
    for config, name in (
        (PolicyLossConfig("grpo", behavior="recompute"), "old_log_probs"),
        (PolicyLossConfig(kl_coefficient=0.1), "ref_log_probs"),
        (PolicyLossConfig(entropy_coefficient=0.1), "entropy"),
    ):
        with pytest.raises(UserError, match=f"{name}: is missing"):
            compute_policy_loss(inputs, config)


@pytest.mark.parametrize("name", objective_names())
def test_the_path_for_devices_gives_the_numbers_of_the_path_for_the_host(name, monkeypatch):
    batch = make_batch(6)
    results = []
    for on_host in (True, False):
        monkeypatch.setattr(PackedSequences, "on_host", on_host)
        leaf = batch.leaf()
        output = call(batch, log_probs=leaf, name=name, old_log_probs=batch.old_log_probs)
        output.loss.backward()
        results.append((leaf.grad, output.coefficient))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def half(ratios, *, weight: float = 0.5):
    """A user's own objective."""
    return weight * ratios.log_ratio.exp()


def test_a_users_own_objective_is_loaded_by_module_and_function():
    batch = make_batch(0)
    output = call(batch, name="tests.losses.test_bad_input:half", weight=0.25)
    expected = 0.25 * (batch.log_probs - batch.behavior_log_probs).exp()
    torch.testing.assert_close(output.coefficient[batch.mask], expected[batch.mask])
    with pytest.raises(UserError, match="nearest is 'weight'"):
        call(batch, name="tests.losses.test_bad_input:half", wieght=0.25)


def test_the_recipe_becomes_a_config():
    schema = pytest.importorskip("vespo_megatron.recipe.schema")
    config = PolicyLossConfig.from_recipe(schema.LossConfig(), "rollout")
    assert config == PolicyLossConfig()
    values = {"name": "grpo", "behavior": "recompute", "correction": {"weight": "tis", "high": 3.0}}
    values["hyperparameters"] = {"clip_high": 0.3, "opsm_delta": 0.1}
    made = PolicyLossConfig.from_recipe(schema.LossConfig().with_values(values), "recompute")
    assert made.correction.high == 3.0 and made.hyperparameters["clip_high"] == 0.3


def test_importing_the_losses_loads_torch_and_the_standard_library_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import vespo_megatron.losses; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(found) - set(sys.stdlib_module_names) == {"vespo_megatron"}


def test_nothing_waits_for_the_device_between_inputs_and_backward(monkeypatch):
    """On a device `.item()`, `.tolist()` and `bool()` of a tensor wait; the meta device refuses them."""
    cu = torch.tensor([0, 3, 5])
    for name in objective_names():
        if name == "minpro" or (get_objective(name).search and name != "bapo"):
            continue  # needs the longest response, or every token at once; says so
        inputs = LossInputs(
            torch.zeros(5, device="meta", requires_grad=True),
            torch.zeros(5, device="meta"),
            torch.zeros(2, device="meta"),
            cu,
            mask=torch.ones(5, dtype=torch.bool, device="meta"),
            old_log_probs=torch.zeros(5, device="meta"),
        )
        output = compute_policy_loss(inputs, PolicyLossConfig(name, behavior="recompute"), Normalizer(5, 2))
        output.loss.backward()
        assert inputs.log_probs.grad.shape == (5,)
