"""Which cores of the host a run has, how many threads each of its processes computes with, and how those wait."""

from __future__ import annotations

import os

from vespo_megatron.recipe.schema import Recipe

_SPINS = 20_000
"""Turns a thread waits for work before it sleeps: about 0.2 ms, longer than the pauses inside a step."""


def core_shares(runs: int) -> list[set[int]]:
    """Cores for each of so many runs beside each other: as many for each, one at least.

    No two have the same ones unless there are more runs than cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // runs)
    return [{cores[(run * share + core) % len(cores)] for core in range(share)} for run in range(runs)]


def trainer_environment(recipe: Recipe, cores: int | None = None) -> dict[str, str]:
    """OpenMP's variables for a trainer rank of a run with so many cores; None: this process's."""
    return _environment(recipe.cluster.gpus_per_node + (_servers(recipe) if _at_once(recipe) else 0), cores)


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


def _environment(processes: int, cores: int | None = None) -> dict[str, str]:
    """For one of so many processes that compute at once.

    libgomp counts the workers of every thread that computes (trainer, in-process engine, gloo). Once there are more
    than cores, they sleep after 100 turns, and waking them costs more than most operations of a small model: a step
    took three times as long, and so did SGLang's with the passive policy, which never waits at all. 'active' raises
    the 100 to 1,000; its own limit, five minutes, is put down to what leaves the cores to others (gcc,
    libgomp/env.c).
    """
    threads = max(1, (cores or len(os.sched_getaffinity(0))) // max(1, processes))
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": str(_SPINS)}
