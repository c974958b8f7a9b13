"""Memory that servers give back: which of them are asked, in which order, and what becomes of those that fail."""

from __future__ import annotations

import threading

import pytest
from fault_server import FaultServer
from rollout_helpers import generate, make_requests

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang import connect
from vespo_megatron.rollout_sglang.faults import ServerFault
from vespo_megatron.rollout_sglang.start_lock import StartLock
from vespo_megatron.rollout_sglang.weight_sync.session import WeightSync

RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"
ALL, REST = ["weights", "kv_cache", "cuda_graph"], ["kv_cache", "cuda_graph"]


class NothingToSend:
    """A transport and a stream of no tensors."""

    opens_session = True

    def connect(self, servers, ranks):
        pass

    begin = finish = disconnect = send = allocate = lambda *_: None


class Recorded(FaultServer):
    """What was asked of it that concerns memory, in order; weights checks are about no tensors."""

    refuses = ""

    def answer(self, handler, body):
        path = handler.path.partition("?")[0]
        if path == self.refuses:
            return self._send(handler, 500, {"error": {"message": "out of memory"}})
        if path in (RELEASE, RESUME):
            self.asked.append((path, body["tags"]))
        elif path in ("/begin_weight_update", "/continue_generation", "/flush_cache"):
            self.asked.append(path)
        elif path == "/weights_checker":
            rank = {"checksums": {}, "parallelism_info": [{"tp_rank": 0}]}
            return self._send(handler, 200, {"ranks": [rank]})
        return super().answer(handler, body)

    def __init__(self, *arguments, **settings):
        self.asked = []
        super().__init__(*arguments, **settings)


@pytest.fixture
def engine_of(tiny_recipe, tmp_path):
    engines = []

    def make(*servers):
        recipe = tiny_recipe.with_values(
            {
                "policy.generation.sglang_cfg.recovery_timeout": 5.0,
                "policy.generation.sglang_cfg.startup_timeout": 5.0,
                "policy.generation.sglang_cfg.health_timeout": 1.0,
            }
        )
        engine = connect(recipe, [server.url for server in servers], run_dir=tmp_path)
        engine.sync.close()
        engine.sync = WeightSync(engine.clients, NothingToSend(), bucket_bytes=8)
        for server in servers:
            server.asked.clear()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def test_weights_come_back_before_the_update_and_the_rest_after_it(engine_of):
    with Recorded() as server:
        engine = engine_of(server)
        assert engine.release_memory() == 1
        assert engine.release_memory() == 1, "what has released is not asked again"
        with pytest.raises(UserError, match="memory is released"):
            generate(engine, make_requests(1))
        engine.update_weights([], 1)
        with pytest.raises(UserError, match="cache is released"):
            generate(engine, make_requests(1))
        engine.resume_memory()
        generate(engine, make_requests(1))
        update = [(RESUME, ["weights"]), "/begin_weight_update"]
        serve = [(RESUME, REST), "/flush_cache", "/continue_generation"]
        assert server.asked == [(RELEASE, ALL), *update, *serve]


def test_a_server_that_came_up_anew_is_asked_for_all_it_took(engine_of):
    first, second = Recorded(), Recorded()
    with second:
        engine = engine_of(first, second)
        engine.release_memory()
        first.close()
        with Recorded(port=first.port) as again:
            assert engine.release_memory() == 2
            assert again.asked == [(RELEASE, ALL)] and second.asked == [(RELEASE, ALL)]
            engine.update_weights([], 1)
            engine.resume_memory()
            assert (RESUME, REST) in again.asked and (RESUME, REST) in second.asked


def test_one_that_keeps_its_memory_ends_the_run_and_one_that_is_gone_does_not(engine_of):
    first, second = Recorded(), Recorded()
    with second:
        engine = engine_of(first, second)
        first.close()
        assert engine.release_memory() == 1
        engine.update_weights([], 1)
        engine.resume_memory()
        second.refuses = RELEASE
        with pytest.raises(ServerFault, match="out of memory"):
            engine.release_memory()


def test_one_that_cannot_take_its_cache_back_is_left_out(engine_of):
    first, second = Recorded(), Recorded()
    with first, second:
        engine = engine_of(first, second)
        engine.release_memory()
        engine.update_weights([], 1)
        first.refuses = RESUME
        engine.resume_memory()
        generate(engine, make_requests(4))
        assert first.calls.get("/generate", 0) == 1 and second.calls["/generate"] > 1, "the first was the probe"


def test_the_lock_is_the_trainer_s_while_servers_are_released_and_while_none_is_up_theirs(engine_of, tmp_path):
    server, lock = Recorded(), StartLock(tmp_path)
    engine = engine_of(server)
    engine.release_memory()
    assert not lock.try_acquire()
    server.close()
    assert engine.release_memory() == 0
    started = []

    def start():
        if lock.try_acquire():
            started.append(Recorded(port=server.port))
            lock.release()
        else:
            timer()

    def timer():
        threading.Timer(0.05, start).start()

    timer()
    engine.await_server()
    with started[0] as again:
        assert again.asked == [(RELEASE, ALL)] and not lock.try_acquire()
        engine.update_weights([], 1)
        engine.resume_memory()
        assert lock.try_acquire()
        lock.release()
