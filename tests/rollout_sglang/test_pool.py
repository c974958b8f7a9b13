"""A pool whose servers fail: every prompt is answered exactly once, or the run stops soon and says which server it was.

The servers are `FaultServer`s and the weight sync a stand-in that makes the same calls; `test_real_pool.py` has
the real ones.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
from fault_server import FaultServer
from rollout_helpers import generate, make_requests

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang import connect
from vespo_megatron.rollout_sglang.faults import WeightsNeeded


class Sync:
    """The calls of a weight update, and which servers took part in each."""

    def __init__(self, clients):
        self.clients, self.updates, self.lacks_memory = list(clients), [], False

    def set_servers(self, clients):
        self.clients = list(clients)

    def update(self, named_tensors, version, *, resume=True, in_place=False):
        for path in ("/pause_generation", "/begin_weight_update", "/end_weight_update"):
            for client in self.clients:
                client.call(path, {})
        for client in self.clients:
            client.call("/update_weight_version", {"new_version": str(version)})
            if resume:
                client.resume()
        self.updates.append([client.url for client in self.clients])
        return "checksum"

    def close(self):
        pass


@pytest.fixture
def recipe(tiny_recipe):
    return tiny_recipe.with_values(
        {
            "policy.generation.sglang_cfg.request_timeout": 5.0,
            "policy.generation.sglang_cfg.recovery_timeout": 0.5,
            "policy.generation.sglang_cfg.health_timeout": 1.0,
        }
    )


@pytest.fixture
def pool_of(recipe):
    with ExitStack() as stack:

        def start(*servers, **settings):
            for server in servers:
                stack.enter_context(server)
            changed = {f"policy.generation.sglang_cfg.{key}": value for key, value in settings.items()}
            engine = connect(recipe.with_values(changed), [server.url for server in servers])
            engine.sync.close()
            engine.sync = Sync(engine.clients)
            stack.callback(engine.close)
            return engine

        yield start


def check_each_once(requests, results, seen):
    assert [result.request_id for result in results] == [request.request_id for request in requests]
    assert sorted(result.request_id for result in seen) == sorted(request.request_id for request in requests)


@contextmanager
def after(seconds, action):
    timer = threading.Timer(seconds, action)
    timer.start()
    yield
    timer.join()


@pytest.mark.parametrize(
    "fault", ["500", "truncated", "NaN", "a token less", "one reply less", "no routes", "old weights", "drops"]
)
def test_the_prompts_of_a_server_that_fails_are_answered_by_the_other_each_once(pool_of, fault):
    bad, good = FaultServer(fault), FaultServer()
    engine = pool_of(bad, good)
    requests, seen = make_requests(24, max_new_tokens=3), []
    results = generate(engine, requests, on_result=seen.append)
    check_each_once(requests, results, seen)
    metrics = engine.metrics()
    assert metrics["rollout/faults"] == metrics["rollout/server_0/faults"] == 1
    assert metrics["rollout/redispatched"] >= 2 and metrics["rollout/servers"] == 1
    assert metrics["rollout/server_0/requests"] == 0 and metrics["rollout/server_1/requests"] == 24
    assert bad.url in str(engine.pool.servers[0].fault)
    calls = bad.calls["/generate"]
    generate(engine, make_requests(4, max_new_tokens=3))
    assert bad.calls["/generate"] == calls, "a server that failed gets no prompts"


def test_a_server_that_stalls_is_left_at_the_deadline_of_its_request(pool_of):
    engine = pool_of(FaultServer("stalls"), FaultServer(), request_timeout=1.0)
    requests, seen = make_requests(8, max_new_tokens=3), []
    start = time.monotonic()
    check_each_once(requests, generate(engine, requests, on_result=seen.append), seen)
    assert time.monotonic() - start < 4


def test_a_server_without_a_sign_of_life_is_left_long_before_its_requests_are_due(pool_of):
    bad = FaultServer("hangs")
    engine = pool_of(bad, FaultServer(), request_timeout=100.0)
    requests, seen = make_requests(8, max_new_tokens=3), []
    start = time.monotonic()
    check_each_once(requests, generate(engine, requests, on_result=seen.append), seen)
    assert time.monotonic() - start < 8
    assert "no sign of life" in str(engine.pool.servers[0].fault) and bad.url in str(engine.pool.servers[0].fault)


def test_a_server_cut_off_in_mid_batch_loses_and_doubles_nothing(pool_of):
    first, second = FaultServer(delay_s=0.2), FaultServer(delay_s=0.05)
    engine = pool_of(first, second)
    requests, seen = make_requests(120, max_new_tokens=3), []
    engine.pool.slots.dispatcher.limit = 8
    with after(0.5, first.close):
        results = generate(engine, requests, on_result=seen.append)
    check_each_once(requests, results, seen)
    answered = engine.metrics()
    assert answered["rollout/server_0/requests"] + answered["rollout/server_1/requests"] == 120
    assert 0 < answered["rollout/server_0/requests"] < 60 and answered["rollout/redispatched"] > 0


def test_a_returned_server_gets_prompts_only_after_an_update_that_includes_it(pool_of):
    first, second = FaultServer(), FaultServer()
    engine = pool_of(first, second)
    port = first.port
    first.close()
    requests, seen = make_requests(8, max_new_tokens=3), []
    check_each_once(requests, generate(engine, requests, on_result=seen.append), seen)
    with FaultServer(port=port) as returned:
        check_each_once(requests, generate(engine, requests, on_result=[].append), seen)
        assert "/generate" not in returned.calls
        engine.update_weights([], 1)
        assert engine.sync.updates == [[returned.url, second.url]]
        generate(engine, requests)
        assert returned.calls["/generate"] > 0
        metrics = engine.metrics()
        assert metrics["rollout/readmitted"] == 1 and metrics["rollout/servers"] == 2


def test_a_server_that_is_down_at_an_update_is_left_out_of_it(pool_of):
    first, second = FaultServer(), FaultServer()
    engine = pool_of(first, second)
    first.close()
    engine.update_weights([], 1)
    assert engine.sync.updates == [[second.url]]
    requests, seen = make_requests(8, max_new_tokens=3), []
    check_each_once(requests, generate(engine, requests, on_result=seen.append), seen)


def test_when_the_last_server_comes_back_the_weights_are_asked_for_and_the_rest_is_drawn(pool_of):
    engine = pool_of(FaultServer(delay_s=0.1))
    engine.pool.membership.recovery_timeout_s = 20.0
    engine.pool.slots.dispatcher.limit = 4
    (server,) = engine.pool.servers
    port = int(server.url.rpartition(":")[2])
    requests, seen, back = make_requests(40, max_new_tokens=3), [], []

    async def scenario():
        running = asyncio.create_task(engine.generate(requests, on_result=seen.append))
        while len(seen) < 12:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(FaultServer.servers[port].close)
        await asyncio.sleep(0.5)
        back.append(FaultServer(port=port))
        with pytest.raises(WeightsNeeded, match=server.url):
            await running

    asyncio.run(asyncio.wait_for(scenario(), 60))
    with back[0]:
        first_half = {result.request_id for result in seen}
        assert 12 <= len(first_half) < 40
        engine.update_weights([], engine.weight_version)
        rest = [request for request in requests if request.request_id not in first_half]
        generate(engine, rest, on_result=seen.append)
        assert sorted(result.request_id for result in seen) == sorted(request.request_id for request in requests)


def test_with_no_server_left_the_error_comes_in_time_and_names_each_with_its_fault(pool_of):
    first, second = FaultServer("500"), FaultServer("NaN")
    engine = pool_of(first, second)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        generate(engine, make_requests(4, max_new_tokens=3))
    assert time.monotonic() - start < 3
    for part in (first.url, second.url, "answered 500: it broke", "nan"):
        assert part in str(caught.value)


def test_a_server_that_stays_away_is_waited_for_until_the_deadline_and_named(pool_of):
    server = FaultServer()
    engine = pool_of(server)
    server.close()
    start = time.monotonic()
    with pytest.raises(UserError, match="no server is left for 0.5 s") as caught:
        generate(engine, make_requests(4, max_new_tokens=3))
    assert time.monotonic() - start < 10 and server.url in str(caught.value)
    with pytest.raises(UserError, match="no server is left"):
        engine.update_weights([], 1)


def test_a_server_that_fails_again_and_again_is_given_up(pool_of):
    bad = FaultServer("500")
    engine = pool_of(bad, FaultServer())
    for version in range(1, 5):
        generate(engine, make_requests(4, max_new_tokens=3))
        engine.update_weights([], version)
    assert [bad.url in urls for urls in engine.sync.updates] == [True, True, False, False]


def test_a_server_that_refuses_an_update_is_left_out_and_the_update_made_again(pool_of):
    bad, good = FaultServer("refuses begin"), FaultServer()
    engine = pool_of(bad, good)
    for _ in range(3):
        with pytest.raises(WeightsNeeded, match="a session is open") as caught:
            engine.update_weights([], 1)
        assert bad.url in str(caught.value) and good.url not in caught.value.where
    engine.update_weights([], 1)
    assert engine.sync.updates == [[good.url]]
    requests, seen = make_requests(8, max_new_tokens=3), []
    check_each_once(requests, generate(engine, requests, on_result=seen.append), seen)


def test_the_only_server_refusing_an_update_is_the_error(pool_of):
    bad = FaultServer("refuses begin")
    engine = pool_of(bad)
    with pytest.raises(UserError, match="a session is open") as caught:
        engine.update_weights([], 1)
    assert bad.url in str(caught.value) and not isinstance(caught.value, WeightsNeeded)


@pytest.mark.parametrize("call", ["/pause_generation", "/begin_weight_update", "/update_weight_version"])
def test_the_only_server_dying_in_an_update_is_waited_for_and_the_update_made_again(pool_of, call):
    class Dies(FaultServer):
        dead = False

        def answer(self, handler, body):
            if handler.path == call and self.posts.get("/generate"):  # not while connecting, but for its probe
                self.dead = True
                threading.Thread(target=self.close).start()
            if not self.dead:
                super().answer(handler, body)

    first, back = Dies(), []
    engine = pool_of(first)
    engine.pool.membership.recovery_timeout_s = 20.0
    with after(1.0, lambda: back.append(FaultServer(port=first.port))):
        with pytest.raises(WeightsNeeded) as caught:
            engine.update_weights([], 1)
        assert first.url in str(caught.value)
        engine.update_weights([], 1)
    with back[0]:
        assert engine.sync.updates == [[first.url]]
        assert len(generate(engine, make_requests(2, max_new_tokens=2))) == 2


def test_a_prompt_that_fells_every_server_ends_the_run_by_name(pool_of):
    engine = pool_of(*(FaultServer("500") for _ in range(4)))
    with pytest.raises(UserError, match=r"request r0: failed on 3 servers"):
        generate(engine, make_requests(1, group_size=1, max_new_tokens=3))


def test_concurrent_generations_share_the_limit_and_the_metrics_add_up(pool_of):
    servers = [FaultServer(delay_s=0.05), FaultServer(delay_s=0.05)]
    engine = pool_of(*servers)
    engine.pool.slots.dispatcher.limit = 4

    async def both():
        batches = [make_requests(16, group_size=4, max_new_tokens=3) for _ in range(2)]
        return await asyncio.gather(*(engine.generate(batch) for batch in batches))

    first, second = asyncio.run(both())
    assert len(first) == len(second) == 16
    metrics = engine.metrics()
    assert metrics["rollout/server_0/in_flight_max"] == metrics["rollout/server_1/in_flight_max"] == 4
    assert metrics["rollout/server_0/requests"] + metrics["rollout/server_1/requests"] == 32
    assert metrics["rollout/queue_max"] >= 24 and 0 < metrics["rollout/queue_mean"] < 32
    assert 0.05 <= metrics["rollout/latency_p50"] <= metrics["rollout/latency_p95"] <= metrics["rollout/latency_p99"]
    assert metrics["rollout/tokens_per_second"] == pytest.approx(96 / engine_seconds(metrics), rel=1e-6)
    assert engine.metrics()["rollout/server_0/requests"] == 0, "metrics are popped"


def engine_seconds(metrics):
    """96 tokens at the rate reported: between the four rounds' sleeps and a generous bound."""
    seconds = 96 / metrics["rollout/tokens_per_second"]
    assert 0.2 <= seconds < 5
    return seconds


def test_a_pause_ends_what_waits_for_room_and_what_came_too_late(pool_of):
    """Four at a time on a server that keeps what reaches it, as a paused one does: nobody waits for either."""
    server = FaultServer("stalls")
    engine = pool_of(server, max_concurrent_requests=4, request_timeout=60.0)
    requests = [replace(request, group_id=request.request_id) for request in make_requests(12, max_new_tokens=3)]
    began = time.monotonic()

    async def paused():
        drawing = asyncio.create_task(engine.generate(requests))
        while sum(each.in_flight for each in engine.pool.servers) < 4:
            await asyncio.sleep(0.01)
        await engine.pause()
        return await asyncio.wait_for(drawing, 2)

    results = asyncio.run(paused())
    assert [result.request_id for result in results] == [request.request_id for request in requests]
    assert all(result.finish_reason == "abort" and len(result.output_ids) == 0 for result in results)
    assert time.monotonic() - began < 10
    assert engine.metrics()["rollout/servers"] == 1, "the server has done nothing wrong"

    server.fault = ""
    asyncio.run(engine.resume())
    assert all(len(result.output_ids) == 3 for result in generate(engine, requests))
