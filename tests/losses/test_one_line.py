"""`repr` of what the losses take and give is one line, with shapes in place of numbers."""

import dataclasses

import pytest
import torch

from tests.losses.batches import make_batch
from vespo_megatron import losses
from vespo_megatron.losses.one_line import one_line


@pytest.fixture
def made():
    batch = make_batch(3)
    inputs = losses.LossInputs(
        batch.leaf(), batch.behavior_log_probs, batch.advantages, batch.cu_seqlens, batch.mask, batch.old_log_probs
    )
    config = losses.PolicyLossConfig("grpo", {"clip_high": 0.3}, behavior="recompute")
    output = losses.compute_policy_loss(inputs, config)
    padded = torch.zeros(40, 50)
    return [
        inputs,
        config,
        output,
        output.metrics,
        losses.Normalizer(torch.tensor(63.0), 9.0),
        losses.compute_ratios(inputs, config),
        losses.pack(padded, torch.ones_like(padded, dtype=torch.bool)),
        losses.compute_advantages(torch.rand(64), [str(i // 8) for i in range(64)]),
        losses.AdvantageOptions("opo", overlong="drop"),
        losses.CorrectionConfig(weight="tis"),
        losses.Rejection(high=2.0),
        losses.RouterShift(floor=0.9),
        losses.get_objective("grpo"),
    ]


def test_every_public_dataclass_is_one_line_of_shapes(made):
    public = {entry for entry in vars(losses).values() if isinstance(entry, type) and dataclasses.is_dataclass(entry)}
    assert {type(value) for value in made} == public
    for value in made:
        text = repr(value)
        assert text.startswith(f"{type(value).__name__}(") and "\n" not in text and len(text) < 700
        assert "tensor(" not in text


def test_shapes_types_and_gradients_are_said(made):
    tokens = len(made[0].log_probs)
    assert f"log_probs=<float64 [{tokens}], requires grad>" in repr(made[0])
    assert "ref_log_probs" not in repr(made[0])  # None
    assert "loss=" in repr(made[2]) and "config=PolicyLossConfig(name='grpo'" in repr(made[2])
    assert repr(made[4]) == "Normalizer(num_tokens=63, num_sequences=9.0)"
    assert "sums={" in repr(made[3]) and "entries}" in repr(made[3])


def test_a_number_is_shown_only_where_it_is_in_host_memory():
    assert one_line(torch.tensor(0.25)) == "0.25"
    assert one_line(torch.zeros((), device="meta")) == "<float32 [] on meta>"
