"""Parameters that `plan` counts of every family against those that transformers makes."""

from __future__ import annotations

import pytest
from family_checkpoints import COMMON, FAMILIES

from vespo_megatron.plan.memory import parameters
from vespo_megatron.plan.published import PUBLISHED
from vespo_megatron.recipe.model_shape import shape_of_config


def counted_by_transformers(config) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    buffers = [each for name, each in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return sum(each.numel() for each in [*model.parameters(), *buffers])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family(model_type):
    from transformers import AutoConfig

    keys = COMMON | FAMILIES[model_type]
    shape = shape_of_config({"model_type": model_type} | keys)
    assert parameters(shape).total == counted_by_transformers(AutoConfig.for_model(model_type, **keys))


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen3-30B-A3B", 30.5),  # the model card
        ("Qwen3-235B-A22B", 235),  # the model card
        ("Qwen3-8B", 8.2),  # the model card
        ("Llama-3.2-3B", 3.21),  # the model card
        ("OLMoE-1B-7B", 6.9),  # arXiv 2409.02060, table 2
        ("GLM-4.5-Air", 106),  # arXiv 2508.06471, table 1
    ],
)
def test_published_models_have_the_size_that_is_published(name, billions):
    assert parameters(PUBLISHED[name]).total == pytest.approx(billions * 1e9, rel=0.01)
