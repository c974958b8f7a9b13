"""Answers scored by a pool of their own."""

from __future__ import annotations

import asyncio

from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards import RewardPool, RewardRequest


def score(env: EnvConfig, *texts: str, truth: str = "4"):
    """The rewards of `texts`, in order."""
    pool = RewardPool(env)
    try:
        return asyncio.run(pool.score([RewardRequest("s", text, truth) for text in texts]))
    finally:
        pool.close()
