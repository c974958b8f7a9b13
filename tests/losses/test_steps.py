"""The four steps of the policy loss: pure, frozen, one collective, and no trace of tokens where sums will do."""

from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.losses.batches import loss_inputs, make_batch
from vespo_megatron.losses import CorrectionConfig, LossInputs, PolicyLossConfig, Rejection, compute_policy_loss
from vespo_megatron.losses.coefficient import coefficient
from vespo_megatron.losses.corrected_ratios import corrected_ratios
from vespo_megatron.losses.loss_inputs import check
from vespo_megatron.losses.loss_weights import loss_weights
from vespo_megatron.losses.ratio_sums import BLOCK_TOKENS

CONFIGS = [
    PolicyLossConfig("vespo"),
    PolicyLossConfig("grpo", {"opsm_delta": 0.01}),
    *(
        PolicyLossConfig(name, behavior="recompute", correction=correction)
        for name in ("vespo", "gspo", "grpo")
        for correction in (
            CorrectionConfig("tis", apply="before_clip"),
            CorrectionConfig("tis", level="sequence", high=1.1, apply="before_clip"),
            CorrectionConfig("icepop", low=0.9, high=1.1, veto=0.5, apply="before_clip"),
            CorrectionConfig(
                "tis", normalize=True, reject=(Rejection("k3", "mean", high=0.1), Rejection("k1", "token", 0.9))
            ),
        )
    ),
]


def made_inputs(group=None):
    batch = make_batch(2)
    return loss_inputs(batch, batch.leaf(), entropy=batch.log_probs, group=group)


def steps(inputs, config):
    given = check(inputs, config)
    corrected = corrected_ratios(given, config)
    factors = coefficient(corrected, config)
    return given, corrected, factors, loss_weights(corrected, factors, config, None)


def tensors(result):
    """Every tensor inside a step's result."""
    for field in fields(result):
        value = getattr(result, field.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif is_dataclass(value):
            yield from tensors(value)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.name}-{c.correction and c.correction.weight}")
def test_a_step_changes_nothing_it_was_given_and_its_result_cannot_be_changed(config):
    inputs = made_inputs()
    with torch.no_grad():
        results = steps(inputs, config)
        before = [[tensor.clone() for tensor in tensors(result)] for result in results]
        given, corrected, factors, _ = results
        again = (
            given,
            corrected_ratios(given, config),
            coefficient(corrected, config),
            loss_weights(corrected, factors, config, None),
        )
    for result, repeated, expected in zip(results, again, before, strict=True):
        for of_result, of_repeated, tensor in zip(tensors(result), tensors(repeated), expected, strict=True):
            torch.testing.assert_close(of_result, tensor, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(of_repeated, tensor, rtol=0, atol=0, equal_nan=True)
        with pytest.raises(FrozenInstanceError):
            setattr(result, fields(result)[0].name, None)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.name}-{c.correction and c.correction.weight}")
def test_a_loss_with_full_metrics_is_one_all_reduce(config, monkeypatch):
    reduced = []
    monkeypatch.setattr(dist, "all_reduce", lambda values, **_: reduced.append(tuple(values.shape)))
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    output = compute_policy_loss(made_inputs(group=object()), config)
    output.loss.backward()
    assert len(reduced) == 1 and reduced[0][1] == len(output.bad_sequences)


TOKENS = 3 * BLOCK_TOKENS


def long_inputs(masked):
    behavior_log_probs = torch.full((TOKENS,), -1.0)
    return LossInputs(
        (behavior_log_probs + 1e-6).requires_grad_(),
        behavior_log_probs,
        torch.ones(8),
        torch.arange(0, TOKENS + 1, TOKENS // 8),
        mask=torch.ones(TOKENS, dtype=torch.bool) if masked else None,
    )


class _Memory(TorchDispatchMode):
    """Notes the operators that make a tensor of at least `least` elements in memory of its own."""

    def __init__(self, least):
        super().__init__()
        self.least, self.found = least, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))

        def memory(tree):
            return {leaf.untyped_storage().data_ptr(): leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)}

        given = memory((args, kwargs))
        for pointer, tensor in memory(result).items():
            if pointer not in given and tensor.numel() >= self.least:
                self.found.append(str(operator))
        return result


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["vespo", "gspo", "topr"])
def test_a_sequence_objective_makes_no_tensor_of_the_tokens_before_its_gradient(name, masked):
    inputs = long_inputs(masked)
    with _Memory(TOKENS) as memory:
        compute_policy_loss(inputs, PolicyLossConfig(name, metrics="none"))
    assert memory.found == (["aten._to_copy.default"] if masked else [])  # the mask as numbers, to count it


def test_a_token_objective_makes_some():
    inputs = long_inputs(False)
    with _Memory(TOKENS) as memory:
        compute_policy_loss(inputs, PolicyLossConfig("grpo", metrics="none"))
    assert len(memory.found) > 2
