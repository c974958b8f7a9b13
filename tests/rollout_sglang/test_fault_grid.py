"""Every endpoint × every way a reply goes wrong: the run goes on or stops by a message, and no server stays locked.

The servers are `WeightServer`s, one of them behind a `FaultProxy`; the weight sync is the real one, over shared memory.
`test_real_fault_grid.py` has two real servers.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from fault_proxy import FAULTS, FaultProxy
from fault_server import FaultServer
from rollout_helpers import generate, make_requests
from rollout_rounds import a_round, push
from served_weights import WeightServer, held

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.rollout_sglang import connect
from vespo_megatron.rollout_sglang.client import client
from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.client.contract import ENDPOINTS
from vespo_megatron.rollout_sglang.client.control import call
from vespo_megatron.rollout_sglang.client.session import open_session
from vespo_megatron.rollout_sglang.faults import ServerFault, ServersFailed
from vespo_megatron.rollout_sglang.pool import membership

DEADLINE_S = 30.0
"""Of every call of a round: a sound server on a machine that is busy must not seem late."""
ONE_OF_EACH_KIND = ("cut middle", "another protocol", "a list", "doubled")
"""The server seems gone, is at fault, means something else, has said it twice. Every test of a run has these."""
ASKED_ELSEWHERE = (
    "/ready",
    "/openapi.json",
    "/update_weights_from_disk",
    "/release_memory_occupation",
    "/resume_memory_occupation",
)
CONNECTING = (
    "/continue_generation",
    "/pause_generation",
    "/end_weight_update",
    "/flush_cache",
    "/server_info",
    "/model_info",
    "/update_weight_version",
    "/generate",
)
RUNNING = (
    "/generate",
    "/server_info",
    "/pause_generation",
    "/end_weight_update",
    "/freeze_gc",
    "/weights_checker",
    "/begin_weight_update",
    "/update_weights_from_tensor",
    "/update_weight_version",
    "/flush_cache",
    "/continue_generation",
)
ALONE = sorted({*ENDPOINTS, *ASKED_ELSEWHERE} - {*CONNECTING, *RUNNING})
"""Control calls that no round here has."""
MAY_BE_TAKEN = {"doubled", "garbled status", "garbled length", "garbled middle"}
MAY_BE_TAKEN |= {"a list", "text", "null", "digits", "another's answer", "permuted"}
"""Where a command's reply says no more than that it was done."""


@pytest.fixture
def recipe(tiny_recipe, monkeypatch):
    monkeypatch.setattr(SGLangClient, "control_timeout_s", DEADLINE_S)
    monkeypatch.setattr(membership, "_UP_TIMEOUT_S", DEADLINE_S)
    settings = {
        "weight_transport": "tensor",
        "weight_update_timeout": DEADLINE_S,
        "request_timeout": DEADLINE_S,
        "recovery_timeout": 2.0,
        "health_timeout": 0.0,
    }
    return tiny_recipe.with_values({f"policy.generation.sglang_cfg.{key}": value for key, value in settings.items()})


faults_of_a_run = pytest.mark.parametrize(
    "faults",
    [ONE_OF_EACH_KIND, pytest.param(FAULTS, marks=[pytest.mark.nightly, pytest.mark.timeout(1800)])],
    ids=["some", "all"],
)


@faults_of_a_run
@pytest.mark.parametrize("path", RUNNING)
def test_a_run_goes_on_with_the_other_server_whatever_one_replies(recipe, path, faults):
    """A server that was spoiled is back with the next update; after all of it, whoever connects finds both serving."""
    with WeightServer() as spoiled, WeightServer() as other, FaultProxy(spoiled.url) as proxy:
        engine, version = connect(recipe, [proxy.url, other.url]), 0
        for fault in faults:
            proxy.spoil(path, fault)
            a_round(engine, version, held)
            assert proxy.spoiled == 1 or path == "/freeze_gc", fault  # asked of servers that join
            proxy.spoil("", "")
            version += 2
            push(engine, version, held)  # of a server that is sound it includes the other
            assert len(engine.pool.membership.serving) == 2, fault
        engine.close()
        check_nothing_is_locked(recipe, proxy, spoiled, other)


@faults_of_a_run
@pytest.mark.parametrize("path", sorted({*CONNECTING, *RUNNING}))
def test_a_run_of_one_server_goes_on_or_ends_with_a_message_that_names_it(recipe, path, faults):
    with WeightServer() as server, FaultProxy(server.url) as proxy:
        ended = []
        for fault in faults:
            server.settings["weight_version"] = "default"  # as of a server that was never updated
            proxy.spoil(path, fault)
            try:
                engine = connect(recipe, [proxy.url])
                try:
                    if path not in CONNECTING:
                        a_round(engine, 0, held)
                finally:
                    engine.close()
            except UserError as error:
                assert isinstance(error, ServerFault | ServersFailed) and proxy.url in str(error), fault
                ended.append(fault)
            assert proxy.spoiled >= 1, fault
            proxy.spoil("", "")
            check_nothing_is_locked(recipe, proxy, server)
        assert "doubled" not in ended


def check_nothing_is_locked(recipe, proxy, *servers):
    """Whoever comes next finds servers that serve, no update open, and weights that are known or pushed anew."""
    engine = connect(recipe, [proxy.url, *(server.url for server in servers[1:])])
    push(engine, 7, held)
    assert len(generate(engine, make_requests(2, max_new_tokens=1))) == 2
    engine.close()
    assert all(server.serves.is_set() and not server.update_is_open for server in servers)


def test_a_spoiled_reply_to_a_call_that_no_round_has_is_the_servers_fault():
    with FaultServer() as server, ExitStack() as stack, ThreadPoolExecutor(32) as threads:

        def attempt(path, fault):
            proxy = stack.enter_context(FaultProxy(server.url))
            proxy.spoil(path, fault)
            start = time.monotonic()
            try:
                call(proxy.url, path, {}, timeout_s=5.0, max_bytes=1 << 20)
                outcome = None
            except ServerFault as error:
                assert error.url == proxy.url and path in error.where
                outcome = error
            assert proxy.spoiled == 1 and time.monotonic() - start < 20
            return outcome

        under_way = {(path, fault): threads.submit(attempt, path, fault) for path in ALONE for fault in FAULTS}
        outcomes = {each: attempt.result() for each, attempt in under_way.items()}
    for path in ALONE:
        taken = {fault for fault in FAULTS if outcomes[path, fault] is None}
        assert "doubled" in taken and taken <= MAY_BE_TAKEN, path


def test_a_spoiled_answer_is_taken_or_the_servers_fault_and_another_prompts_is_never_taken(recipe, monkeypatch):
    monkeypatch.setattr(client, "_RETRY_DELAYS_S", (0.0,))
    requests = make_requests(4, max_new_tokens=2)

    async def attempt(fault, url):
        server = SGLangClient(
            url, read_shape(recipe.policy.model_name), context_length=128, return_routes=True, request_timeout_s=5.0
        )
        async with open_session() as session:
            try:
                await server.is_healthy(session, timeout_s=5.0)
                return await server.generate(session, requests)
            except ServerFault as error:
                assert error.url == url, fault
                return None

    with FaultServer(weight_version="0") as server, ExitStack() as stack:
        proxies = {fault: stack.enter_context(FaultProxy(server.url)) for fault in FAULTS}
        for path in ("/generate", "/health"):
            for fault, proxy in proxies.items():
                proxy.spoil(path, fault, times=9)

            async def all_at_a_time():
                return await asyncio.gather(*(attempt(fault, proxy.url) for fault, proxy in proxies.items()))

            answers = dict(zip(FAULTS, asyncio.run(all_at_a_time()), strict=True))
            assert all(proxy.spoiled for proxy in proxies.values())
            for fault, results in answers.items():
                if path == "/health" or fault == "doubled":
                    assert [one.request_id for one in results] == [one.request_id for one in requests], fault
                elif not fault.startswith("garbled"):  # what is still a number may be another
                    assert results is None, fault
