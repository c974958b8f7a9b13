"""The cores of a machine, shared among the processes that compute at once."""

from __future__ import annotations

import os

import pytest

from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.host_threads import core_shares, server_environment, trainer_environment


@pytest.fixture
def recipe(monkeypatch):
    """Two trainer ranks and one server on eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    recipe = Recipe().with_values({"cluster.gpus_per_node": 2})
    return recipe


def threads(recipe: Recipe) -> tuple[int, int]:
    """Of a trainer rank and of a server."""
    return tuple(int(of(recipe)["OMP_NUM_THREADS"]) for of in (trainer_environment, server_environment))


def test_who_takes_turns_has_all_cores(recipe):
    assert threads(recipe) == (4, 8)


def test_who_computes_at_the_same_time_shares_them(recipe):
    recipe = recipe.with_values({"grpo.async_grpo.enabled": True})
    assert threads(recipe) == (2, 2)
    recipe = recipe.with_values({"policy.generation.sglang_cfg.num_servers": 3})
    assert threads(recipe) == (1, 1)


def test_servers_elsewhere_take_no_cores(recipe):
    recipe = recipe.with_values(
        {"grpo.async_grpo.enabled": True, "policy.generation.sglang_cfg.urls": ["http://10.0.0.7:30000"]}
    )
    assert threads(recipe)[0] == 4


def test_threads_neither_sleep_between_operations_nor_hold_an_idle_machines_cores(recipe):
    environment = trainer_environment(recipe)
    assert environment["OMP_WAIT_POLICY"] == "active" and int(environment["GOMP_SPINCOUNT"]) < 100_000


def test_runs_beside_each_other_have_cores_of_their_own(monkeypatch, recipe):
    assert core_shares(1) == [set(range(8))]
    assert core_shares(3) == [{0, 1}, {2, 3}, {4, 5}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 7})
    assert core_shares(3) == [{3}, {7}, {3}]
    assert trainer_environment(recipe, cores=6)["OMP_NUM_THREADS"] == "3"
