"""What a response's length does to its reward."""

from __future__ import annotations

from vespo_megatron.recipe.schema import RewardShapingConfig


def overlong_penalty(length: int, config: RewardShapingConfig, max_new_tokens: int) -> float:
    """DAPO's soft punishment, ≤ 0: nothing up to max − buffer tokens, then falling straight to −penalty at max.

    Source: arXiv 2503.14476, equation 13, scaled by the penalty.
    """
    longest = config.max_response_length or max_new_tokens
    into_buffer = length - (longest - config.overlong_buffer_length)
    return -config.overlong_buffer_penalty * min(max(into_buffer / config.overlong_buffer_length, 0.0), 1.0)
