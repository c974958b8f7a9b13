"""FLOPs by formula against those that PyTorch counts in transformers' own forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from vespo_megatron.megatron import flops
from vespo_megatron.recipe.model_shape import read_shape

LENGTH = 48


@pytest.fixture(scope="module", params=[[], [1]], ids=["sparse", "one dense layer"])
def model(request, tmp_path_factory):
    config = Qwen3MoeConfig(
        vocab_size=126,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=request.param,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    folder = tmp_path_factory.mktemp("counted")
    config.save_pretrained(folder)
    return Qwen3MoeForCausalLM(config).float(), read_shape(folder)


def causal(shape, length):
    """transformers' eager attention multiplies the whole square, of which a causal model needs the lower half."""
    return flops.attention_scores(shape, length, causal=False) - flops.attention_scores(shape, length)


def test_a_forward_is_what_is_counted(model):
    network, shape = model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randint(0, 126, (1, LENGTH)))
    assert counter.get_total_flops() == flops.forward(shape, [LENGTH], LENGTH) + causal(shape, LENGTH)


def test_an_update_is_three_forwards_but_for_what_needs_no_gradient(model):
    network, shape = model
    with FlopCounterMode(display=False) as counter:
        network(torch.randint(0, 126, (1, LENGTH))).logits.sum().backward()
    expected = flops.training(shape, [LENGTH], LENGTH) + 3 * causal(shape, LENGTH)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_only_response_tokens_have_logits(model):
    _, shape = model
    fewer = flops.forward(shape, [LENGTH], 10)
    assert flops.forward(shape, [LENGTH], LENGTH) - fewer == 38 * flops.output_layer(shape)
