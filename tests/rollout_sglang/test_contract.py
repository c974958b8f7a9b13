"""Another version of SGLang: taken if it keeps the contract, named if it does not."""

from __future__ import annotations

import pytest
from fault_server import FaultServer

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang import connect
from vespo_megatron.rollout_sglang.client.contract import ENDPOINTS, REQUEST_FIELDS


class OtherVersion(FaultServer):
    """Says that it is 9.9 and what it has."""

    def __init__(self, *args, without=(), **settings):
        super().__init__(*args, version="9.9", **settings)
        fields = {name: {} for name in REQUEST_FIELDS if name not in without}
        self.schema = {
            "paths": {path: {} for path in ENDPOINTS if path not in without},
            "components": {"schemas": {"GenerateReqInput": {"properties": fields}}},
        }

    def answer(self, handler, body):
        if handler.path == "/openapi.json":
            return self._send(handler, 200, self.schema)
        return super().answer(handler, body)


def test_a_version_that_keeps_the_contract_is_taken(tiny_recipe):
    with OtherVersion() as server:
        engine = connect(tiny_recipe, [server.url])
        assert "SGLang 9.9" in engine.description
        engine.close()


@pytest.mark.parametrize("lacking", ["/begin_weight_update", "return_routed_experts"])
def test_a_version_that_lacks_something_is_named_with_it(tiny_recipe, lacking):
    with OtherVersion(without=[lacking]) as server, pytest.raises(UserError) as caught:
        connect(tiny_recipe, [server.url])
    for part in (server.url, "SGLang 9.9 does not keep the contract of 0.5.23", lacking, "install sglang==0.5.23"):
        assert part in str(caught.value)


def test_a_version_that_answers_otherwise_is_named(tiny_recipe):
    class Answers(OtherVersion):
        def _reply(self, ids, count, fault):
            reply = super()._reply(ids, count, fault)
            reply["meta_info"]["token_logprobs"] = reply["meta_info"].pop("output_token_logprobs")
            return reply

    with Answers() as server, pytest.raises(UserError) as caught:
        connect(tiny_recipe, [server.url])
    for part in (server.url, "SGLang 9.9 does not keep the contract of 0.5.23", "0 log-probs"):
        assert part in str(caught.value)


def test_a_server_that_is_no_sglang_is_named(tiny_recipe):
    with FaultServer(version=None) as server, pytest.raises(UserError, match="which SGLang") as caught:
        connect(tiny_recipe, [server.url])
    assert server.url in str(caught.value)


@pytest.mark.sglang
def test_the_endpoints_and_fields_of_the_contract_are_those_of_the_real_server(sglang_servers, tiny_recipe):
    from vespo_megatron.rollout_sglang.client.control import call

    schema = call(sglang_servers.urls[0], "/openapi.json", timeout_s=30)
    assert set(ENDPOINTS) <= set(schema["paths"])
    assert set(REQUEST_FIELDS) <= set(schema["components"]["schemas"]["GenerateReqInput"]["properties"])
