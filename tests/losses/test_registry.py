"""The registry of objectives: names that are taken, functions given as names, functions that are no φ."""

import functools

import pytest
import torch

from tests.losses.batches import make_batch
from vespo_megatron.errors import UserError
from vespo_megatron.losses import PolicyLossConfig, get_objective, objective, objective_names, objectives, policy_loss
from vespo_megatron.losses.theory import objective_phi

ROW = {"level": "token", "aggregation": "token-mean", "source": "a test"}


def call(phi, **hyperparameters):
    batch = make_batch(0)
    leaf = batch.leaf()
    output = policy_loss(
        leaf,
        batch.behavior_log_probs,
        batch.advantages,
        batch.cu_seqlens,
        mask=batch.mask,
        name=phi,
        **hyperparameters,
    )
    output.loss.backward()
    return output, leaf.grad


def half(ratios, *, weight=0.5):
    return weight * ratios.log_ratio.exp()


def test_a_name_that_is_taken_is_refused_and_keeps_its_function():
    before = get_objective("grpo").phi
    for again in (half, before):
        with pytest.raises(UserError, match="objective 'grpo': is registered already"):
            objective("grpo", **ROW)(again)
    assert get_objective("grpo").phi is before


def test_a_registered_name_works_and_is_refused_a_second_time(monkeypatch):
    monkeypatch.setattr("vespo_megatron.losses.registry._OBJECTIVES", {})
    objective("mine", **ROW)(half)
    assert get_objective("mine").phi is half and get_objective("mine").is_users_own
    with pytest.raises(UserError, match=r"(?s)'mine': is registered already.*give the function itself"):
        objective("mine", **ROW)(half)


def test_a_function_as_the_name_is_the_objective_itself():
    output, gradient = call(half, weight=0.25)
    by_name, expected = call(f"{__name__}:half", weight=0.25)
    assert torch.equal(output.loss, by_name.loss) and torch.equal(gradient, expected)
    assert get_objective(functools.partial(half, weight=0.1)).level == "token"
    with pytest.raises(UserError, match="nearest is 'weight'"):
        call(half, wieght=0.25)


@pytest.mark.parametrize("name", objective_names())
def test_a_registered_function_as_the_name_is_the_registered_objective(name):
    assert get_objective(get_objective(name).phi) is get_objective(name)


def test_a_registered_function_keeps_its_level_and_its_anchor():
    output, gradient = call(objectives.sequence.vespo)
    by_name, expected = call("vespo")
    assert torch.equal(output.loss, by_name.loss) and torch.equal(gradient, expected)


def test_a_function_has_its_level_from_its_attribute():
    def per_response(ratios):
        return ratios.sequence_log_ratio.exp()

    with pytest.raises(UserError, match=r'(?s)φ returned torch.float64 \[\d+\].*\[tokens\].*level = "sequence"'):
        call(per_response)
    per_response.level = "sequence"
    assert call(per_response)[0].loss.isfinite()
    assert objective_phi(per_response, torch.tensor([0.5, 2.0]), positive=True).tolist() == pytest.approx([0.5, 2.0])
    half_per_response = functools.partial(half)
    half_per_response.level = "sequence"
    with pytest.raises(UserError, match=r'(?s)\[num_sequences\].*level = "token"'):
        call(half_per_response)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (1.0, "φ returned a float"),
        (None, "φ returned a NoneType"),
        (torch.tensor(1.0), r"φ returned torch.float32 \[\]"),
        (torch.ones(3), r"φ returned torch.float32 \[3\]"),
        (torch.ones(63, dtype=torch.int64), r"φ returned torch.int64 \[63\]"),
        (torch.ones(63, dtype=torch.bool), r"φ returned torch.bool \[63\]"),
    ],
)
def test_what_a_function_returns_must_be_a_coefficient(returned, message):
    with pytest.raises(UserError, match=message):
        call(lambda ratios: returned)


@pytest.mark.parametrize(
    "phi",
    [lambda: 1, lambda ratios, _: 1, lambda *, ratios: 1, torch.exp],
    ids=["nothing", "two", "keyword", "C"],
)
def test_what_one_ratios_does_not_call_is_refused(phi):
    with pytest.raises(UserError, match="cannot be called as φ"):
        PolicyLossConfig(name=phi)
    with pytest.raises(UserError, match="cannot be called as φ"):
        objective("mine", **ROW)(phi)
    assert "mine" not in objective_names()


def test_a_hyperparameter_without_a_default_must_be_given():
    def scaled(ratios, *, scale):
        return scale * torch.ones_like(ratios.log_probs)

    with pytest.raises(UserError, match="scale is missing"):
        call(scaled)
    assert call(scaled, scale=2.0)[0].loss.isfinite()


@pytest.mark.parametrize("name", [None, 5, ["vespo"]])
def test_what_is_neither_a_name_nor_a_function_is_refused(name):
    with pytest.raises(UserError, match="is no objective"):
        PolicyLossConfig(name=name)


@pytest.mark.parametrize("name", ["", ":", ":phi", "math:", "a.b:c"])
def test_a_name_that_loads_nothing_is_refused(name):
    with pytest.raises(UserError, match="unknown objective|cannot load"):
        get_objective(name)


def test_a_level_that_is_none_is_refused():
    with pytest.raises(UserError, match="unknown level 'tokens'; the nearest is 'token'"):
        objective("mine", **ROW | {"level": "tokens"})(half)
    half_again = functools.partial(half)
    half_again.level = 3
    with pytest.raises(UserError, match="unknown level '3'"):
        get_objective(half_again)
