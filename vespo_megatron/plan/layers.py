"""Which layers a pipeline stage holds."""

from __future__ import annotations

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.recipe.schema import Recipe


def stage_layers(shape: ModelShape, recipe: Recipe) -> list[int]:
    """Layers of every pipeline stage."""
    megatron = recipe.policy.megatron_cfg
    stages = megatron.pipeline_model_parallel_size
    first, last = megatron.num_layers_in_first_pipeline_stage, megatron.num_layers_in_last_pipeline_stage
    if stages == 1 or (first is None and last is None):
        return [shape.num_hidden_layers // stages] * stages
    given = (first or 0) + (last or 0)
    others = stages - (first is not None) - (last is not None)
    share = (shape.num_hidden_layers - given) // max(1, others)
    return [
        first if first is not None else share,
        *[share] * (stages - 2),
        last if last is not None else share,
    ]
