"""Two real servers in a Python environment of their own, behind a key: started from the recipe, killed, restarted.

One pair of servers for the whole file, in the order of its tests: the last one kills one of them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import sysconfig
import time
import venv

import numpy as np
import psutil
import pytest
from rollout_helpers import Reference, generate, make_requests

from vespo_megatron.controller.sampler import to_sample
from vespo_megatron.data.layout import SequenceLayout
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import to_yaml
from vespo_megatron.rollout_sglang import connect, launch_servers
from vespo_megatron.rollout_sglang.api_key import VARIABLE, hide_api_key
from vespo_megatron.rollout_sglang.client.control import call
from vespo_megatron.rollout_sglang.conversation import Conversation
from vespo_megatron.routing_replay.table import apply_stale_policy, slice_routes

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

KEY = "a-key-nobody-may-see"


def other_environment(folder):
    """A virtual environment with an interpreter of its own, and this one's packages; returns the interpreter."""
    venv.create(folder, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = sysconfig.get_paths()["purelib"]
    (folder / "lib" / version / "site-packages" / "packages.pth").write_text(
        f"import site; site.addsitedir({packages!r})\n"
    )
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def recipe(tiny_recipe, tmp_path_factory):
    return tiny_recipe.with_values(
        {
            "policy.generation.sglang_cfg.num_servers": 2,
            "policy.generation.sglang_cfg.max_restarts": 1,
            "policy.generation.sglang_cfg.api_key": KEY,
            "policy.generation.sglang_cfg.python": str(other_environment(tmp_path_factory.mktemp("environment"))),
        }
    )


@pytest.fixture(scope="module")
def servers(recipe, tmp_path_factory):
    try:
        with launch_servers(recipe, tmp_path_factory.mktemp("run")) as servers, servers.supervised():
            yield servers
    finally:
        os.environ.pop(VARIABLE, None)


@pytest.fixture(scope="module")
def engine(servers, recipe):
    engine = connect(recipe, servers.urls)
    yield engine
    engine.close()


def processes(server):
    return [p for p in psutil.process_iter() if os.getpgid(p.pid) == server.process_group]


async def drawn_through(engine, reference, first, mode):
    """Twelve responses on both servers, through three updates in one of the ways to make them."""
    requests = make_requests(12, group_size=1, max_new_tokens=70)
    conversations = {request.request_id: Conversation(request, context_length=128) for request in requests}

    async def draw():
        while turns := [turn for each in conversations.values() if (turn := each.next_request()) is not None]:
            for result in await engine.generate(turns):
                conversations[result.request_id.partition("/")[0]].add(result)

    drawing = asyncio.create_task(draw())
    for number in range(1, 4):
        await asyncio.sleep(0.1)
        tensors = reference.named_tensors(0.05 * number, number)
        if mode == "abort_and_continue":
            await engine.pause()
        if mode == "drain":
            await asyncio.wait([drawing])
        await asyncio.to_thread(engine.update_weights, tensors, first + number, in_place=mode == "in_place")
        await engine.resume()
    await drawing
    return [(request, conversations[request.request_id].result()) for request in requests]


@pytest.mark.parametrize("mode", ["abort_and_continue", "in_place", "drain"])
def test_replayed_routes_are_of_the_forward_that_drew_each_token_through_updates_of_both_servers(
    mode, engine, reference
):
    """Against transformers: span by span, on a cache of its own version, or in place on one that all spans share."""
    engine.metrics()
    first = engine.weight_version + 1
    engine.update_weights(reference.named_tensors(), first)
    drawn = asyncio.run(asyncio.wait_for(drawn_through(engine, reference, first, mode), 240))
    found = engine.metrics()
    assert min(found["rollout/server_0/requests"], found["rollout/server_1/requests"]) > 0
    models = {first: reference.with_weights(reference.named_tensors())}
    models |= {first + n: reference.with_weights(reference.named_tensors(0.05 * n, n)) for n in (1, 2, 3)}
    partial = 0
    for request, result in drawn:
        sample = to_sample(result, PromptRecord("p", request.prompt_ids, "s", "4"))
        assert apply_stale_policy([sample], "error") == 0
        layout = SequenceLayout.of_samples([sample])
        table = slice_routes([sample], layout, range(3), topk=2, num_experts=8)
        assert table.live_rows.tolist() == [sample.num_tokens - 1]
        versions = set(result.weight_versions.tolist())
        partial += len(versions) > 1
        if mode == "in_place":
            log_probs, routes = Reference.score_on_one_cache(models, request, result)
        else:
            scored = {version: models[version].score(request, result) for version in versions}
            log_probs = np.array([scored[v][0][index] for index, v in enumerate(result.weight_versions)])
            routes = np.array([scored[v][1][row] for row, v in enumerate(result.route_versions)])
        np.testing.assert_allclose(result.behavior_log_probs, log_probs, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(np.sort(table.experts[:-1], -1), routes)
    assert (partial == 0) == (mode == "drain")


def test_servers_run_in_the_environment_that_the_recipe_names(servers, recipe, engine):
    python = recipe.policy.generation.sglang_cfg.python
    for server in servers.servers:
        commands = [process.cmdline() for process in processes(server)]
        assert any(command[:2] == [python, "-m"] for command in commands), commands
    assert len(generate(engine, make_requests(4))) == 4


def test_the_key_opens_and_shows_nowhere(servers, recipe, engine):
    with pytest.raises(UserError, match=r"answered 401.*\n.*api_key") as caught:
        call(servers.urls[0], "/server_info", timeout_s=10)
    assert KEY not in str(caught.value)
    assert KEY not in to_yaml(hide_api_key(recipe)), "what is saved of the recipe has no key"
    for server in servers.servers:
        assert KEY not in server.log.read_text()
        assert not [p for p in processes(server) if KEY in " ".join(p.cmdline())]
    recipe = recipe.with_values({"policy.generation.sglang_cfg.api_key": "another"})
    with pytest.raises(UserError, match="401") as caught:
        connect(recipe, servers.urls)
    assert servers.urls[0] in str(caught.value) and "another" not in str(caught.value)


def test_a_server_killed_in_mid_batch_costs_no_prompt_and_comes_back_with_the_weights(servers, engine, reference):
    version = engine.weight_version + 1
    engine.update_weights(reference.named_tensors(0.1, seed=1), version)
    expected = reference.with_weights(reference.named_tensors(0.1, seed=1))
    requests, seen = make_requests(96, group_size=8, max_new_tokens=80, longest_prompt=20), []
    victim = servers.servers[0]
    main = next(p for p in processes(victim) if "launch_sglang" in " ".join(p.cmdline()[2:3]))

    async def scenario():
        running = asyncio.create_task(engine.generate(requests, on_result=seen.append))
        while engine.pool.servers[0].in_flight == 0 or len(seen) < 1:
            await asyncio.sleep(0.01)
        assert not running.done(), "the test means mid-batch"
        os.kill(main.pid, signal.SIGKILL)
        return await running

    engine.metrics()
    engine.pool.slots.dispatcher.limit = 16
    results = asyncio.run(asyncio.wait_for(scenario(), 120))
    assert [result.request_id for result in results] == [request.request_id for request in requests]
    assert sorted(result.request_id for result in seen) == sorted(request.request_id for request in requests)
    for request, result in zip(requests, results, strict=True):
        log_probs, routes = expected.score(request, result)
        np.testing.assert_allclose(result.behavior_log_probs, log_probs, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(np.sort(result.routes, -1), routes)
    metrics = engine.metrics()
    assert metrics["rollout/redispatched"] > 0 and metrics["rollout/servers"] == 1
    assert metrics["rollout/server_0/requests"] + metrics["rollout/server_1/requests"] == 96

    deadline = time.monotonic() + 120
    while len(engine.pool.membership.candidates()) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert victim.restarts == 1 and victim.alive
    assert [server.number for server in engine.pool.membership.serving] == [1], (
        "restarted, it holds the checkpoint's weights"
    )
    engine.update_weights(reference.named_tensors(0.1, seed=2), version + 1)
    assert len(engine.pool.membership.serving) == 2
    expected = reference.with_weights(reference.named_tensors(0.1, seed=2))
    requests = make_requests(16)
    for request, result in zip(requests, generate(engine, requests), strict=True):
        np.testing.assert_allclose(result.behavior_log_probs, expected.score(request, result)[0], atol=1e-4, rtol=0)
        assert (result.weight_versions == version + 1).all()
    metrics = engine.metrics()
    assert metrics["rollout/readmitted"] == 1 and metrics["rollout/server_0/requests"] == 8
