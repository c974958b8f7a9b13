"""How many threads each process of a run computes with on the host, and how those wait for one another."""

from __future__ import annotations

import os

from vespo_megatron.recipe.schema import Recipe

_SPINS = 20_000
"""Turns a thread waits for work before it sleeps: about 0.2 ms, longer than the pauses inside a step."""


def trainer_environment(recipe: Recipe) -> dict[str, str]:
    """OpenMP's variables for a trainer rank."""
    return _environment(recipe.cluster.gpus_per_node + (_servers(recipe) if _at_once(recipe) else 0))


def server_environment(recipe: Recipe) -> dict[str, str]:
    """OpenMP's variables for a rank of a server that this run starts on the CPU."""
    return _environment(_servers(recipe) + (recipe.cluster.gpus_per_node if _at_once(recipe) else 0))


def _servers(recipe: Recipe) -> int:
    """Server processes this run starts beside its trainer."""
    generation = recipe.policy.generation
    if generation.backend != "sglang" or generation.sglang_cfg.urls:
        return 0
    return generation.sglang_cfg.num_servers * generation.sglang_cfg.tensor_parallel_size


def _at_once(recipe: Recipe) -> bool:
    """Whether servers and trainer compute at the same time; in a synchronous run they take turns."""
    return recipe.grpo.async_grpo.enabled


def _environment(processes: int) -> dict[str, str]:
    """For one of so many processes that compute at once.

    libgomp counts the workers of every thread that computes (trainer, in-process engine, gloo). Once there are more
    than cores, they sleep after 100 turns, and waking them costs more than most operations of a small model: a step
    took three times as long, and so did SGLang's with the passive policy, which never waits at all. 'active' raises
    the 100 to 1,000; its own limit, five minutes, is put down to what leaves the cores to others (gcc,
    libgomp/env.c).
    """
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, processes))
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": str(_SPINS)}
