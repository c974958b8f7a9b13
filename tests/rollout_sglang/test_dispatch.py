"""The invariants of `dispatch`, over many random schedules."""

from __future__ import annotations

import random

from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams
from vespo_megatron.rollout_sglang.pool.dispatch import Dispatcher, split_calls


def test_a_group_stays_with_its_server_and_no_server_is_overfull():
    random.seed(0)
    for limit in (4, 16):
        dispatcher, loads, home, running = Dispatcher(limit), dict.fromkeys(range(3), 0), {}, []
        for _ in range(2000):
            if running and random.random() < 0.5:
                server, count = running.pop(random.randrange(len(running)))
                loads[server] -= count
            group, count = f"g{random.randrange(40)}", random.randint(1, 6)
            before = dict(loads)
            server = dispatcher.choose(group, count, loads)
            if server is None:
                assert min(before.values()) + count > limit or before[home[group]] + count > limit
                continue
            loads[server] += count
            running.append((server, count))
            assert loads[server] <= max(limit, count)
            if group not in home:
                assert before[server] == min(before.values())
            assert home.setdefault(group, server) == server


def test_a_group_without_its_server_finds_another_and_stays_there():
    dispatcher = Dispatcher(8)
    assert dispatcher.choose("g", 2, {0: 0, 1: 5}) == 0
    assert dispatcher.choose("g", 2, {1: 5}) == 1
    assert dispatcher.choose("g", 2, {0: 0, 1: 5}) == 1
    dispatcher.forget()
    assert dispatcher.choose("g", 2, {0: 0, 1: 5}) == 0


def test_a_call_larger_than_the_limit_goes_alone():
    dispatcher = Dispatcher(4)
    assert dispatcher.choose("", 9, {0: 1}) is None
    assert dispatcher.choose("", 9, {0: 0}) == 0


def test_calls_hold_one_group_and_every_request_once():
    sampling = SamplingParams(1)
    requests = [GenerationRequest(f"r{i}", (1,), sampling, group_id=f"g{i % 3}" if i % 7 else "") for i in range(100)]
    calls = list(split_calls(requests, 16))
    assert sorted(index for call in calls for index in call) == list(range(100))
    for call in calls:
        assert len({requests[index].group_id for index in call}) == 1 and 1 <= len(call) <= 16
    assert sum(requests[call[0]].group_id == "g1" for call in calls) == 2  # 29 requests
