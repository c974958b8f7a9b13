"""Floating-point operations of a decoder, counted as matrix products (two per multiply-add), from its shape alone.

Norms, rotary embedding, softmax and routing's bookkeeping are left out, as is usual for model FLOPs utilisation: they
are a few per cent of the work and none of it is done by matrix units.
"""

from __future__ import annotations

from collections.abc import Iterable

from vespo_megatron.families.shape import ModelShape


def per_token(shape: ModelShape) -> int:
    """Forward, one token through every layer, without attention's scores and without the output layer."""
    heads, kv, dim, hidden = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim, shape.hidden_size
    attention = 2 * hidden * (heads + 2 * kv) * dim + 2 * heads * dim * hidden
    routed = shape.num_experts_per_tok * shape.moe_intermediate_size
    moe = 2 * hidden * shape.num_experts + 6 * hidden * (routed + shape.shared_intermediate_size)
    dense = 6 * hidden * shape.intermediate_size
    sparse = shape.num_moe_layers
    return shape.num_hidden_layers * attention + sparse * moe + (shape.num_hidden_layers - sparse) * dense


def attention_scores(shape: ModelShape, length: int, *, causal: bool = True) -> int:
    """Forward, all layers: queries times keys and weights times values of one sequence of `length` tokens."""
    pairs = length * (length + 1) // 2 if causal else length * length
    return shape.num_hidden_layers * 4 * shape.num_attention_heads * shape.head_dim * pairs


def output_layer(shape: ModelShape) -> int:
    """Forward, one token's logits."""
    return 2 * shape.hidden_size * shape.vocab_size


def forward(shape: ModelShape, lengths: Iterable[int], response_tokens: int) -> int:
    """Forward of sequences of these lengths, with the logits of `response_tokens` of their tokens."""
    lengths = list(lengths)
    body = sum(lengths) * per_token(shape) + sum(attention_scores(shape, length) for length in lengths)
    return body + response_tokens * output_layer(shape)


def training(shape: ModelShape, lengths: Iterable[int], response_tokens: int) -> int:
    """Model FLOPs of an update: forward and backward (twice the forward). What is recomputed does not count."""
    return 3 * forward(shape, lengths, response_tokens)


def sequence_cost(shape: ModelShape, length: int) -> int:
    """Forward of one whole sequence through the layers: what balancing by work balances."""
    return length * per_token(shape) + attention_scores(shape, length)
