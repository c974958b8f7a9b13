"""Environments: what answers a policy between its turns. `EnvironmentPool` runs them; the protocol is `Environment`."""

from vespo_megatron.environments.pool import EnvironmentPool, Episode
from vespo_megatron.environments.protocol import Environment, Observation, Step, Turn

__all__ = ["Environment", "EnvironmentPool", "Episode", "Observation", "Step", "Turn"]
