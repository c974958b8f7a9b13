"""What a forward keeps for its backward, tensor by tensor, in bytes.

Every term is a tensor that the native layers' autograd graph holds, found by listing what they save (tests/plan does
it again in every layout, within 10%). Experts are taken as evenly used; sequences as equally long, but for `PADDING`.
"""

from __future__ import annotations

import math

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.plan.layers import stage_layers
from vespo_megatron.recipe.schema import MegatronConfig, Recipe

PADDING = 1.2
"""Tokens of attention's padded batches over real tokens: assumed, between 1 (equal lengths) and 2 (the worst)."""
_FLOAT32, _INT64 = 4, 8


def peak(shape: ModelShape, recipe: Recipe, tokens: int, stage: int) -> int:
    """The most that stage `stage` holds at a time: every micro-batch in flight, and a layer being recomputed."""
    megatron = recipe.policy.megatron_cfg
    held = in_flight(megatron, stage) * kept(shape, recipe, tokens, stage)
    if megatron.recompute == "full":
        held += max(_attention(shape, recipe, tokens, PADDING) + mlp for mlp in _mlps(shape, recipe, tokens))
    return int(held)


def in_flight(megatron: MegatronConfig, stage: int, micro_batches: float = math.inf) -> float:
    """Micro-batches whose backward a stage has yet to do, at most; with virtual stages a part of one counts as such.

    1F1B, and megatron-core's interleaved schedule (schedules.py, `get_pp_rank_microbatches`).
    """
    stages, virtual = megatron.pipeline_model_parallel_size, megatron.virtual_pipeline_model_parallel_size or 1
    after = stages - stage - 1
    forwards = after + 1 if virtual == 1 else 2 * after + (virtual - 1) * stages + 1
    return min(forwards, virtual * micro_batches) / virtual


def kept(shape: ModelShape, recipe: Recipe, tokens: int, stage: int, padding: float = PADDING) -> int:
    """By one micro-batch of `tokens` on this context parallel rank, from its forward to its backward."""
    megatron = recipe.policy.megatron_cfg
    local = tokens / megatron.tensor_model_parallel_size if megatron.sequence_parallel else tokens
    element = element_size(recipe)
    layers = stage_layers(shape, recipe)[stage]
    if megatron.recompute == "full":
        # Each layer's input, and the angles that all layers share.
        held = layers * local * shape.hidden_size * element + tokens * shape.head_dim * _FLOAT32
    else:
        held = layers * layer(shape, recipe, tokens, padding)
    if stage == 0:
        held += tokens * _INT64
    if stage == megatron.pipeline_model_parallel_size - 1:
        held += _norm(recipe, local, shape.hidden_size) + tokens * shape.hidden_size * element
    return int(held)


def layer(shape: ModelShape, recipe: Recipe, tokens: int, padding: float = PADDING) -> float:
    """By one layer, the mean of the model's sparse and dense ones."""
    return _attention(shape, recipe, tokens, padding) + sum(_mlps(shape, recipe, tokens)) / shape.num_hidden_layers


def _mlps(shape: ModelShape, recipe: Recipe, tokens: int) -> list[float]:
    """Of every layer, what comes after attention."""
    return [
        _experts(shape, recipe, tokens) if is_moe else _dense(shape, recipe, tokens) for is_moe in shape.is_moe_layer
    ]


def element_size(recipe: Recipe) -> int:
    """Bytes of a number in the model's dtype."""
    return 2 if recipe.policy.in_16_bits else 4


def _attention(shape: ModelShape, recipe: Recipe, tokens: int, padding: float) -> float:
    megatron, element, dim = recipe.policy.megatron_cfg, element_size(recipe), shape.head_dim
    tp, cp = megatron.tensor_model_parallel_size, megatron.context_parallel_size
    heads, kv = shape.num_attention_heads // tp, max(1, shape.num_key_value_heads // tp)
    local = tokens / tp if megatron.sequence_parallel else tokens
    held = _norm(recipe, local, shape.hidden_size) + local * shape.hidden_size * element  # input of q, k and v
    if shape.qk_norm != "none":
        held += _query_key_norms(recipe, tokens, heads, kv, dim)
    elif _takes_packs(recipe):
        held += tokens * (heads + 2 * kv) * dim * element  # the value is a view into them all
    if _takes_packs(recipe):
        held += tokens * (heads + kv) * dim * element + tokens * heads * _FLOAT32  # rotated, and log-sums
        return held + tokens * heads * dim * element  # outputs
    held += 4 * tokens * dim * element  # cosines and sines, for queries and for keys
    if megatron.recompute == "selective":
        held += tokens * (heads + kv) * dim * element  # queries and keys once more, rotated
        if recipe.cluster.device == "cpu" and element == 2:
            held += tokens * (heads + 2 * kv) * dim * element  # the value is a view into them all
    else:
        padded = tokens * padding
        held += padded * 2 * heads * dim * element + padded * heads * _FLOAT32  # queries, outputs, log-sums
        held += padded * cp * 2 * kv * dim * element  # keys and values
        held += tokens * heads * dim * element  # outputs without the padding
        held += padded * (1 + cp) * _INT64 + 2 * tokens * _INT64
    return held + tokens * heads * dim * element  # input of the output projection


def _takes_packs(recipe: Recipe) -> bool:
    """Whether the native attention hands packs to FlashAttention (`native.attention.takes_packs`)."""
    on_gpu = recipe.cluster.device != "cpu" and element_size(recipe) == 2
    return on_gpu and recipe.policy.megatron_cfg.context_parallel_size == 1


def _query_key_norms(recipe: Recipe, tokens: int, heads: int, kv: int, dim: int) -> float:
    element, both = element_size(recipe), tokens * (heads + kv)
    packed = tokens * (heads + 2 * kv) * dim * element  # the key is a view into it
    if recipe.cluster.device != "cpu":
        return packed + tokens * heads * dim * element + both * _FLOAT32
    if element == _FLOAT32:
        return packed + tokens * heads * dim * _FLOAT32 + both * (dim + 1) * _FLOAT32
    return both * (2 * dim + 1) * _FLOAT32


def _norm(recipe: Recipe, rows: float, width: int) -> float:
    """PyTorch's fused RMSNorm keeps its input and a scale per row; on the CPU input and result, both in float32."""
    held = 2 * width * _FLOAT32 if recipe.cluster.device == "cpu" else width * element_size(recipe)
    return rows * (held + _FLOAT32)


def _dense(shape: ModelShape, recipe: Recipe, tokens: int) -> float:
    megatron = recipe.policy.megatron_cfg
    local = tokens / megatron.tensor_model_parallel_size if megatron.sequence_parallel else tokens
    held = _norm(recipe, local, shape.hidden_size) + local * shape.hidden_size * element_size(recipe)
    return held + _gated(recipe, tokens, shape.intermediate_size)


def _gated(recipe: Recipe, tokens: float, width: int) -> float:
    """What a gated MLP keeps beside its input: gate and up, the gate's SiLU, and the product."""
    return 4 * tokens * width / recipe.policy.megatron_cfg.tensor_model_parallel_size * element_size(recipe)


def _experts(shape: ModelShape, recipe: Recipe, tokens: int) -> float:
    megatron, element = recipe.policy.megatron_cfg, element_size(recipe)
    tp, etp = megatron.tensor_model_parallel_size, megatron.expert_tensor_parallel_size
    local = tokens / tp if megatron.sequence_parallel else tokens
    mine = tokens / tp  # the MoE layer shards tokens over TP whether or not the rest of the model does
    chosen = mine * shape.num_experts_per_tok
    held = _norm(recipe, local, shape.hidden_size)
    held += mine * shape.hidden_size * element  # input of the router
    held += chosen * (_INT64 + _FLOAT32 + _INT64) + mine * shape.num_experts * (1 + _FLOAT32)  # choice, map, gates
    if recipe.cluster.device != "cpu":
        held += 2 * chosen * _INT64  # where every choice went, from either side (`native.dispatch.Places`)
    if shape.shared_intermediate_size:
        held += _gated(recipe, tokens, shape.shared_intermediate_size)
    rows = chosen * etp  # expert tensor parallel ranks see each other's tokens
    return held + rows * ((shape.hidden_size + 2 * shape.moe_intermediate_size // etp) * element + _FLOAT32)
