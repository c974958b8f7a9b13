"""Rewards: what a response is worth. `RewardPool` scores; the functions are in files of their own."""

from vespo_megatron.rewards.pool import UNSCORED, RewardPool, RewardRequest, RewardResult

__all__ = ["UNSCORED", "RewardPool", "RewardRequest", "RewardResult"]
