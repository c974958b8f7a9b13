"""Which weights the default pattern rounds, in every family."""

from __future__ import annotations

import pytest
from family_checkpoints import COMMON, FAMILIES

from vespo_megatron.megatron.hf_mapping import expected_tensors
from vespo_megatron.quantization import WeightQuantizer
from vespo_megatron.recipe.model_shape import shape_of_config
from vespo_megatron.recipe.schema.mismatch import LINEAR_LAYERS


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_matrix_but_embedding_head_and_routers(model_type):
    shape = shape_of_config({"model_type": model_type} | COMMON | FAMILIES[model_type])
    quantizer, tensors = WeightQuantizer("int4", LINEAR_LAYERS), expected_tensors(shape)
    left = {name for name, size in tensors.items() if len(size) > 1 and not quantizer.takes(name, len(size))}
    routers = {f"model.layers.{layer}.{shape.names.router}" for layer in shape.moe_layers}
    head = set() if shape.tie_word_embeddings else {"lm_head.weight"}
    assert left == {"model.embed_tokens.weight"} | head | routers
    assert not any(quantizer.takes(name, len(size)) for name, size in tensors.items() if len(size) == 1)
