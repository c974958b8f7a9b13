"""A server that misbehaves: each fault ends in bounded time with an error that names the server, or is survived."""

from __future__ import annotations

import time

import pytest
from fault_server import FaultServer
from rollout_helpers import generate, make_requests

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang import connect
from vespo_megatron.rollout_sglang.client.control import call
from vespo_megatron.rollout_sglang.faults import HttpRefused, PluginMissing


@pytest.fixture
def recipe(tiny_recipe):
    recipe = tiny_recipe.with_values(
        {"policy.generation.sglang_cfg.request_timeout": 1.0, "policy.generation.sglang_cfg.recovery_timeout": 0.2}
    )
    return recipe


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("500", "answered 500: it broke"),
        ("stalls", "/generate: did not answer within 1 s"),
        ("drops", "cannot be reached"),
        ("truncated", "not JSON"),
        ("NaN", "nan"),
        ("a token less", "3 log-probs"),
        ("one reply less", "answered 1"),
        ("no routes", "no routed_experts"),
        ("old weights", "weight version 3"),
    ],
)
def test_a_fault_ends_generation_with_an_error_that_names_the_server(recipe, fault, says):
    with FaultServer(fault) as server:
        engine = connect(recipe, [server.url])
        start = time.monotonic()
        with pytest.raises(UserError, match=says) as caught:
            generate(engine, make_requests(4, max_new_tokens=4))
        assert time.monotonic() - start < 8
        assert server.url in str(caught.value)
        engine.close()


@pytest.mark.parametrize("fault", ["busy once", "drops once"])
def test_a_call_that_was_not_taken_on_is_repeated_and_every_prompt_is_answered_once(recipe, fault):
    with FaultServer(fault) as server:
        engine = connect(recipe, [server.url])
        seen = []
        results = generate(engine, make_requests(6, max_new_tokens=4), on_result=seen.append)
        assert sorted(result.request_id for result in seen) == sorted(result.request_id for result in results)
        assert len({result.request_id for result in results}) == 6
        assert server.calls["/generate"] == 1 + 3 + 1  # the probe, three groups, one of them twice
        assert engine.metrics()["rollout/retries"] == 1
        engine.close()


def test_requests_are_spread_over_servers_and_a_group_stays_together(recipe):
    with FaultServer() as first, FaultServer() as second:
        engine = connect(recipe, [first.url, second.url])
        results = generate(engine, make_requests(16, group_size=4, max_new_tokens=2))
        assert len(results) == 16
        assert first.calls["/generate"] == second.calls["/generate"] == 1 + 2
        engine.close()


def test_no_more_requests_are_in_flight_than_the_recipe_says(recipe):
    recipe = recipe.with_values({"policy.generation.sglang_cfg.max_concurrent_requests": 4})
    with FaultServer() as server:
        engine = connect(recipe, [server.url])
        peaks = []
        original = engine.clients[0].generate

        async def watched(session, requests):
            peaks.append(engine.pool.servers[0].in_flight)
            return await original(session, requests)

        engine.clients[0].generate = watched
        generate(engine, make_requests(24, max_new_tokens=2))
        assert max(peaks) == 4
        engine.close()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"context_length": 64}, "context of 64 tokens"),
        ({"enable_return_routed_experts": False}, "returns no routes"),
        ({"dp_size": 2}, "replicas"),
    ],
)
def test_a_server_that_does_not_fit_the_recipe_is_refused_when_connecting(recipe, settings, says):
    with FaultServer(**settings) as server, pytest.raises(UserError, match=says) as caught:
        connect(recipe, [server.url])
    assert server.url in str(caught.value)


def test_servers_with_different_weights_generate_nothing_before_an_update(recipe):
    with FaultServer() as first, FaultServer(weight_version="4") as second:
        engine = connect(recipe, [first.url, second.url])
        with pytest.raises(UserError, match=r"versions \[0, 4\]"):
            generate(engine, make_requests(1))
        engine.close()


def test_a_server_that_a_killed_trainer_left_in_an_update_serves_whoever_comes_next(recipe):
    with FaultServer() as server:
        server.serves.clear()
        server.update_is_open = True
        start = time.monotonic()
        with pytest.raises(UserError, match="paused in the middle of somebody's weight update") as caught:
            connect(recipe, [server.url], takes_over=False)
        assert server.url in str(caught.value) and server.update_is_open, "who only asks changes nothing"
        for _ in range(2):  # whoever was first may have been killed as well
            engine = connect(recipe, [server.url])
            assert server.serves.is_set() and not server.update_is_open
            with pytest.raises(UserError, match="was left in the middle of a weight update"):
                generate(engine, make_requests(1))
            engine.close()
        assert time.monotonic() - start < 20
        engine.clients[0].call("/update_weight_version", {"new_version": "1"})  # as an update ends
        again = connect(recipe, [server.url])
        assert len(generate(again, make_requests(1))) == 1
        again.close()


def test_a_server_that_is_not_there_is_an_error_at_once(recipe):
    with FaultServer() as server:
        pass
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached") as caught:
        connect(recipe, [server.url])
    assert time.monotonic() - start < 5 and server.url in str(caught.value)


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        (400, "Unsupported action='vespo_manifest'", PluginMissing),
        (400, "Unsupported layout of the experts", HttpRefused),
        (400, "model_config: Unsupported action='vespo_manifest' while a session is open", HttpRefused),
        (500, "Unsupported action='vespo_manifest'", HttpRefused),
    ],
)
def test_a_server_without_our_plugin_is_told_apart_from_a_broken_one(recipe, status, message, error):
    """By the whole answer that SGLang 0.5.23 gives to an action it does not know, not by a word in it."""

    class Refuses(FaultServer):
        def answer(self, handler, body):
            if handler.path == "/weights_checker":
                return self._send(handler, status, {"success": False, "message": message})
            return super().answer(handler, body)

    with Refuses() as server:
        engine = connect(recipe, [server.url])
        with pytest.raises(UserError) as caught:
            engine.update_weights([], 1)
        engine.close()
    assert caught.type is error and caught.value.url == server.url
    assert ("vespo_weights plugin" in str(caught.value)) is (error is PluginMissing)


@pytest.mark.sglang
def test_what_sglang_answers_to_an_action_it_does_not_know(sglang_servers):
    with pytest.raises(HttpRefused) as caught:
        call(sglang_servers.urls[0], "/weights_checker", {"action": "nothing", "selector": "target"}, timeout_s=30.0)
    assert (caught.value.status, caught.value.message) == (400, "Unsupported action='nothing'")
