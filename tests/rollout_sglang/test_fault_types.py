"""Recovery acts on what an error is and on the server's URL it carries, never on its text."""

from __future__ import annotations

import pickle
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from fault_server import FaultServer

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang import connect
from vespo_megatron.rollout_sglang.client.check import Check
from vespo_megatron.rollout_sglang.client.control import call
from vespo_megatron.rollout_sglang.client.fan_out import PendingCall, raise_failures, replies
from vespo_megatron.rollout_sglang.client.server_info import ServerInfo
from vespo_megatron.rollout_sglang.faults import (
    ChecksumMismatch,
    HttpRefused,
    PluginMissing,
    ServerFault,
    ServerGone,
    ServersFailed,
    WeightsNeeded,
    faults_of,
)
from vespo_megatron.rollout_sglang.pool.pool import ServerPool
from vespo_megatron.rollout_sglang.pool.server import ServerState
from vespo_megatron.rollout_sglang.weight_sync.servers import Servers

FIRST, SECOND = "http://node:3000", "http://node:30000"


class Client:
    """A server that is up, under any URL."""

    retries = 0

    def __init__(self, url):
        self.url = url

    def server_info(self, *, timeout_s=0.0):
        return ServerInfo.read(Check(self.url), {"startup_time": 7})


@pytest.fixture
def membership():
    pool = ServerPool([Client(FIRST), Client(SECOND)])
    for server in pool.servers:
        server.startup_time = 7
    yield pool.membership
    pool.close()


def states(membership):
    return [server.state for server in membership.servers]


@pytest.mark.parametrize(
    "error",
    [
        ServerFault("answered nonsense", url=FIRST, where=f"server {FIRST} /generate", expected="sense"),
        ServerGone("cannot be reached", url=FIRST),
        HttpRefused(url=FIRST, path="/flush_cache", status=400, message="requests run", fix="wait"),
        PluginMissing(url=FIRST),
        ChecksumMismatch("3 tensors differ", url=FIRST),
        ServersFailed("failed", faults=[ServerGone("gone", url=FIRST), ServerFault("odd", url=SECOND)], where="all"),
        WeightsNeeded("back", where="server a", faults=[ServerGone("gone", url=FIRST)]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_its_fields_across_processes(error):
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error) and str(other) == str(error)
    fields = {name: value for name, value in vars(error).items() if name != "faults"}
    assert {name: value for name, value in vars(other).items() if name != "faults"} == fields
    assert [(type(fault), fault.url, str(fault)) for fault in faults_of(other)] == [
        (type(fault), fault.url, str(fault)) for fault in faults_of(error)
    ]


def test_an_error_that_mentions_another_servers_url_does_not_put_that_one_out_of_service(membership):
    fault = ServerFault(f"does not reach {SECOND}", url=FIRST, where=f"server {FIRST} , which was told of {SECOND} ")
    assert [server.url for server in membership.remove_failed(fault, membership.servers)] == [FIRST]
    assert states(membership) == [ServerState.FAULTY, ServerState.SERVING]


def test_an_error_of_no_server_that_mentions_one_puts_none_out_of_service(membership):
    error = UserError("cannot be read", where=f"weights for server {FIRST} ")
    assert membership.remove_failed(error, membership.servers) == []
    assert states(membership) == [ServerState.SERVING, ServerState.SERVING]


@pytest.mark.parametrize("failed", [FIRST, SECOND])
def test_a_url_that_is_the_beginning_of_another_is_told_apart_from_it(membership, failed):
    for fault in (ServerFault("refused", url=failed), ServerFault("refused", url=failed, where=f"{failed}/generate")):
        assert [server.url for server in membership.remove_failed(fault, membership.servers)] == [failed]
    assert [server.url for server in membership.serving] == [FIRST if failed == SECOND else SECOND]


def test_whether_a_server_is_gone_is_in_the_type_of_its_fault_not_in_its_words(membership):
    first, second = membership.servers
    refused = HttpRefused(url=FIRST, path="/begin_weight_update", status=500, message="the store cannot be reached")
    membership.remove_failed(refused, [first, second])
    membership.remove_failed(ServerGone("reset", url=SECOND), [first, second])
    assert states(membership) == [ServerState.FAULTY, ServerState.GONE]


def test_the_status_and_the_message_of_a_refusal_are_its_fields(tiny_recipe):
    with FaultServer("refuses begin") as server:
        engine = connect(tiny_recipe, [server.url])
        with pytest.raises(HttpRefused) as caught:
            engine.clients[0].call("/begin_weight_update", {})
        engine.close()
    refused = caught.value
    assert (refused.url, refused.path, refused.status, refused.message) == (
        server.url,
        "/begin_weight_update",
        400,
        "a session is open",
    )


def test_a_server_that_is_not_there_is_gone_and_one_that_does_not_answer_is_at_fault():
    with FaultServer("hangs") as server:
        with pytest.raises(ServerFault, match="did not answer within 0.2 s") as late:
            call(server.url, "/health", timeout_s=0.2)
    with pytest.raises(ServerFault, match="cannot be reached") as gone:
        call(server.url, "/health", timeout_s=0.2)
    assert (late.type, gone.type) == (ServerFault, ServerGone)
    assert late.value.url == gone.value.url == server.url


def test_servers_that_fail_an_update_together_are_named_and_left_out_together(tiny_recipe):
    class Sync:
        """Only the call that may be refused, to all servers at once."""

        def __init__(self, clients):
            self.clients = clients

        def set_servers(self, clients):
            self.clients = clients

        def update(self, named_tensors, version, *, resume=True, in_place=False):
            servers = Servers(self.clients, 5.0)
            try:
                servers.post_all("/begin_weight_update", {})
            finally:
                servers.close()

    with FaultServer("refuses begin") as first, FaultServer() as good, FaultServer("refuses begin") as last:
        engine = connect(tiny_recipe, [first.url, good.url, last.url])
        engine.sync.close()
        engine.sync = Sync(engine.clients)
        with pytest.raises(WeightsNeeded) as caught:
            engine.update_weights([], 1)
        assert [fault.url for fault in caught.value.faults] == [first.url, last.url]
        assert first.url in str(caught.value) and last.url in str(caught.value)
        assert [server.url for server in engine.pool.membership.serving] == [good.url]
        engine.sync.close = lambda: None
        engine.close()


def failed(error):
    future = Future()
    future.set_exception(error)
    return future


def test_failures_of_several_servers_are_one_error_and_another_error_is_itself():
    gone, odd = ServerGone("gone", url=FIRST), ServerFault("odd", url=SECOND)
    with pytest.raises(ServersFailed) as caught:
        raise_failures([PendingCall(FIRST, failed(gone)), PendingCall(SECOND, failed(odd))])
    assert caught.value.faults == (gone, odd)
    with pytest.raises(ZeroDivisionError):
        raise_failures([PendingCall(FIRST, failed(gone)), PendingCall(SECOND, failed(ZeroDivisionError()))])
    with pytest.raises(ServerGone):
        raise_failures([PendingCall(FIRST, failed(gone)), PendingCall(SECOND, Future())])
    raise_failures([PendingCall(FIRST, Future())])


def test_replies_come_in_order_and_a_server_that_gives_none_in_time_is_named():
    with ThreadPoolExecutor(2) as threads:
        calls = [PendingCall(str(number), threads.submit(int, number)) for number in range(5)]
        assert replies(calls, 5.0) == [0, 1, 2, 3, 4]
    with pytest.raises(ServerFault, match=r"did not answer within 0\.1 s") as caught:
        replies([PendingCall(FIRST, Future())], 0.1)
    assert caught.value.url == FIRST
