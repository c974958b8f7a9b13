"""Requests and replies of SGLang's `/generate`, without a server: what is sent, and every way a reply can be wrong."""

from __future__ import annotations

import base64
import copy
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from model_config import shape as shape_of

from vespo_megatron.data.sample import UNKNOWN_VERSION
from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.client.reply import parse_reply
from vespo_megatron.rollout_sglang.client.request import build_body, check_request
from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams

SHAPE = shape_of(num_hidden_layers=3, vocab_size=100, max_position_embeddings=64)
REQUEST = GenerationRequest("step1/p/0", (5, 6, 7), SamplingParams(max_new_tokens=4))
ROUTES = np.arange(6 * 3 * 2, dtype="<i4").reshape(6, 3, 2) % 8


def reply(**meta):
    """A reply as 0.5.23 gave it: 4 tokens to a prompt of 3."""
    return {
        "output_ids": [60, 83, 96, 30],
        "meta_info": {
            "id": "x",
            "finish_reason": {"type": "length", "length": 4},
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "cached_tokens": 2,
            "weight_version": "7",
            "weight_versions": [{"version": "7", "start": 0, "end": 4}],
            "output_token_logprobs": [[-4.5, 60, None], [-5.25, 83, None], [-3.0, 96, None], [-0.5, 30, None]],
            "routed_experts": encode(ROUTES),
        }
        | meta,
    }


def encode(routes):
    return base64.b64encode(np.ascontiguousarray(routes, dtype="<i4").tobytes()).decode()


def parse(value, request=REQUEST, shape=SHAPE, return_routes=True, **options):
    return parse_reply(
        value,
        request,
        shape,
        sent_as="x",
        server="http://127.0.0.1:31000",
        return_routes=return_routes,
        context_length=64,
        **options,
    )


def test_a_good_reply_becomes_a_result():
    result = parse(reply())
    np.testing.assert_array_equal(result.output_ids, [60, 83, 96, 30])
    np.testing.assert_array_equal(result.behavior_log_probs, np.float32([-4.5, -5.25, -3.0, -0.5]))
    np.testing.assert_array_equal(result.weight_versions, [7, 7, 7, 7])
    np.testing.assert_array_equal(result.routes, ROUTES)
    assert result.routes.dtype == np.uint8 and result.route_versions.tolist() == [7] * 6
    assert result.finish_reason == "length" and result.request_id == "step1/p/0"
    assert result.extra == {"cached_tokens": 2.0}


def test_routes_of_dense_layers_are_left_out():
    shape = replace(SHAPE, is_moe_layer=(True, False, True))
    np.testing.assert_array_equal(parse(reply(), shape=shape).routes, ROUTES[:, [0, 2]])


TWO_VERSIONS = [{"version": "7", "start": 0, "end": 1}, {"version": "8", "start": 1, "end": 4}]


def test_each_row_of_routes_is_of_the_weights_that_drew_the_token_after_it():
    result = parse(reply(weight_versions=TWO_VERSIONS, num_retractions=0))
    np.testing.assert_array_equal(result.weight_versions, [7, 8, 8, 8])
    np.testing.assert_array_equal(result.routes, ROUTES)
    assert result.route_versions.tolist() == [7, 7, 7, 8, 8, 8]


def test_a_retracted_response_of_several_versions_has_routes_of_the_last_alone():
    """SGLang ran it again from its first token, at a moment that it does not tell."""
    result = parse(reply(weight_versions=TWO_VERSIONS, num_retractions=1))
    assert result.route_versions.tolist() == [UNKNOWN_VERSION] * 3 + [8] * 3 and result.extra["retractions"] == 1
    assert parse(reply(num_retractions=2)).route_versions.tolist() == [7] * 6


def test_a_turn_brings_the_routes_it_was_asked_for_alone():
    """SGLang takes one start for all requests of a call, the least; the rest is cut off here."""
    request = replace(REQUEST, routes_start=2)
    body = build_body([replace(REQUEST, routes_start=1), request], SHAPE, context_length=64, return_routes=True)
    assert body["routed_experts_start_len"] == 1
    answer = reply(routed_experts=encode(ROUTES[1:]), weight_versions=TWO_VERSIONS)
    result = parse(answer, request, sent_routes_start=1)
    np.testing.assert_array_equal(result.routes, ROUTES[2:])
    assert result.route_versions.tolist() == [7, 8, 8, 8]


def test_a_retracted_response_that_is_aborted_while_it_waits_has_drawn_nothing():
    """SGLang has dropped its routes, and tells it without them."""
    answer = reply(finish_reason={"type": "abort"}, routed_experts=None)
    result = parse(answer)
    assert result.finish_reason == "abort" and result.routes is None
    assert len(result.output_ids) == len(result.behavior_log_probs) == len(result.weight_versions) == 0
    assert len(parse(answer, return_routes=False).output_ids) == 4


def test_an_abort_before_the_first_token_is_an_empty_result():
    value = reply(
        finish_reason={"type": "abort"},
        completion_tokens=0,
        weight_versions=[{"version": "7", "start": 0, "end": 0}],
        output_token_logprobs=[],
        routed_experts=None,
    )
    value["output_ids"] = []
    result = parse(value)
    assert result.finish_reason == "abort" and len(result.output_ids) == len(result.behavior_log_probs) == 0


def with_output_ids(ids):
    value = copy.deepcopy(reply())
    value["output_ids"] = ids
    return value


def with_route(expert):
    routes = ROUTES.copy()
    routes[0, 0, 0] = expert
    return reply(routed_experts=encode(routes))


WRONG = {
    "not an object": ([], "list"),
    "no meta_info": ({"output_ids": []}, "meta_info"),
    "ids missing": (with_output_ids(None), "output_ids"),
    "ids not integers": (with_output_ids([60, 83.0, 96, 30]), "output_ids"),
    "id out of vocabulary": (with_output_ids([60, 83, 100, 30]), "outside the vocabulary"),
    "fewer ids than log-probs": (with_output_ids([60, 83, 96]), "completion_tokens"),
    "too many tokens": (
        {**reply(completion_tokens=5, output_token_logprobs=[[-1.0, 9, None]] * 5), "output_ids": [9] * 5},
        "5 tokens",
    ),
    "log-prob of another token": (
        reply(output_token_logprobs=[[-1.0, 60, None], [-1.0, 82, None], [-1.0, 96, None], [-1.0, 30, None]]),
        "do not belong",
    ),
    "no log-probs": (reply(output_token_logprobs=None), "0 log-probs"),
    "a log-prob less": (reply(output_token_logprobs=[[-1.0, 60, None]]), "1 log-probs"),
    "log-prob is null": (
        reply(output_token_logprobs=[[None, 60, None], [-1.0, 83, None], [-1.0, 96, None], [-1.0, 30, None]]),
        "do not belong",
    ),
    "log-prob is NaN": (
        reply(output_token_logprobs=[[float("nan"), 60, None], [-1.0, 83, None], [-1.0, 96, None], [-1.0, 30, None]]),
        "nan",
    ),
    "log-prob above zero": (
        reply(output_token_logprobs=[[0.5, 60, None], [-1.0, 83, None], [-1.0, 96, None], [-1.0, 30, None]]),
        "0.5",
    ),
    "another prompt": (reply(prompt_tokens=2), "prompt_tokens"),
    "unknown end": (reply(finish_reason={"type": "eos"}), "finish_reason"),
    "no end": (reply(finish_reason=None), "finish_reason"),
    "version not a number": (reply(weight_versions=[{"version": "default", "start": 0, "end": 4}]), "default"),
    "versions with a gap": (reply(weight_versions=[{"version": "7", "start": 1, "end": 4}]), "spans"),
    "versions too short": (reply(weight_versions=[{"version": "7", "start": 0, "end": 3}]), "spans"),
    "no routes": (reply(routed_experts=None), "no routed_experts"),
    "routes not base64": (reply(routed_experts="@@@"), "base64"),
    "a route row less": (reply(routed_experts=encode(ROUTES[:-1])), "routes of 30 numbers"),
    "expert that is not there": (with_route(8), "expert"),
    "negative expert": (with_route(-1), "expert"),
    "one expert twice": (with_route(1), "twice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_reply_is_an_error_that_names_request_and_server(name):
    value, says = WRONG[name]
    with pytest.raises(UserError) as caught:
        parse(value)
    for text in (says, "step1/p/0", "http://127.0.0.1:31000"):
        assert text in str(caught.value)


def test_a_truncated_log_prob_beyond_float64_is_an_error_like_any_other():
    value = truncated()
    value["meta_info"]["output_token_sampling_logprobs"] = [-(10**400), 0, 0, 0]
    with pytest.raises(UserError, match="truncated log-prob"):
        parse(value, TRUNCATED)


TRUNCATED = replace(REQUEST, sampling=SamplingParams(max_new_tokens=4, top_k=2))
MASKS = [[60, 1], [83], [2, 96], [30, 99]]


def truncated(**meta):
    return reply(output_token_sampling_mask=MASKS, output_token_sampling_logprobs=[-1.0, 0.0, -1.0, -0.1], **meta)


def test_a_truncated_reply_says_what_each_token_was_drawn_from():
    result = parse(truncated(), TRUNCATED)
    assert result.sampling_mask.counts.tolist() == [2, 1, 2, 2]
    assert result.sampling_mask.ids.tolist() == [*chain.from_iterable(MASKS)]
    assert result.behavior_log_probs.tolist() == pytest.approx([-1.0, 0.0, -1.0, -0.1])
    assert parse(reply(), replace(TRUNCATED, evaluation=True)).sampling_mask is None


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        (None, "masks of 0 tokens"),
        (MASKS[1:], "masks of 3 tokens"),
        ([[60], [83], [], [30]], "no list of token ids"),
        ([[60], [83], [96, 100], [30]], "no list of token ids"),
        ([[60], [83], ["96"], [30]], "no list of token ids"),
        ([[60], [83], 96, [30]], "no list of token ids"),
        ([[60], [83], [95], [30]], "outside its sampling mask"),
        ([[60], [83], [96, 2**63], [30]], "no list of token ids"),
    ],
)
def test_a_wrong_sampling_mask_is_an_error(masks, says):
    value = truncated()
    value["meta_info"]["output_token_sampling_mask"] = masks
    with pytest.raises(UserError, match=says):
        parse(value, TRUNCATED)


def test_the_body_asks_for_what_the_request_says_and_never_past_the_context():
    requests = [
        REQUEST,
        GenerationRequest("b", (1,) * 60, SamplingParams(max_new_tokens=100, temperature=0.5, stop_token_ids=(9,))),
    ]
    body = build_body(requests, SHAPE, context_length=64, return_routes=True)
    assert body["input_ids"] == [[5, 6, 7], [1] * 60]
    first, second = body["sampling_params"]
    assert first["max_new_tokens"] == 4 and first["ignore_eos"] and first["temperature"] == 1.0
    assert second["max_new_tokens"] == 4 and not second["ignore_eos"] and second["stop_token_ids"] == [9]
    assert body["return_logprob"] and body["return_routed_experts"]


def test_a_request_that_is_sent_again_has_another_id():
    first, second = (build_body([REQUEST, REQUEST], SHAPE, 64, True)["rid"] for _ in range(2))
    assert len({*first, *second}) == 4


@pytest.mark.parametrize(
    ("prompt", "sampling", "says"),
    [
        ((), {}, "0 prompt tokens"),
        ((1,) * 64, {}, "64 prompt tokens"),
        ((1, 100), {}, "token id 100"),
        ((1, -1), {}, "token id -1"),
        ((1,), {"max_new_tokens": 0}, "max_new_tokens"),
        ((1,), {"temperature": -0.1}, "temperature"),
        ((1,), {"top_p": 0.0}, "top_p"),
        ((1,), {"top_k": 0}, "top_k"),
    ],
)
def test_a_request_the_server_would_choke_on_is_refused_before_it_is_sent(prompt, sampling, says):
    request = GenerationRequest("r", prompt, SamplingParams(**({"max_new_tokens": 4} | sampling)))
    with pytest.raises(UserError, match=says):
        check_request(request, SHAPE, 64)


HUGE = {
    "token ids beyond int64": {"output_ids": [60, 83, 96, 2**63]},
    "a log-prob beyond float64": {"meta": {"output_token_logprobs": [[-(10**400), 60], [0, 83], [0, 96], [0, 30]]}},
    "a weight version beyond int64": {"meta": {"weight_version": str(2**63), "weight_versions": None}},
    "a weight version that is infinite": {"meta": {"weight_version": float("inf"), "weight_versions": None}},
    "weight versions that are a number": {"meta": {"weight_versions": 7}},
    "cached tokens that are text": {"meta": {"cached_tokens": "many"}},
    "routes with a lone surrogate": {"meta": {"routed_experts": "\udc80"}},
}
"""Found by tests/fuzz/fuzz_reply.py, each of which ended in an exception of its own."""


@pytest.mark.parametrize("name", HUGE)
def test_what_the_fuzzer_found_is_an_error_like_any_other(name):
    wrong = HUGE[name]
    value = reply(**wrong.get("meta", {})) | {key: part for key, part in wrong.items() if key != "meta"}
    with pytest.raises(UserError, match="step1/p/0") as error:
        parse(value)
    assert len(str(error.value)) < 400
