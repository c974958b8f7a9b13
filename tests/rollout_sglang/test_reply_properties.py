"""A reply that is right is taken as it is; one with anything changed is taken, or refused by a `UserError`."""

from __future__ import annotations

import base64

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from model_config import shape as shape_of

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.client.reply import parse_reply
from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def cases(draw):
    """(request, shape, the reply of a server that does what it should, routes)."""
    layers = draw(st.integers(1, 4))
    sparse = tuple(sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1))))
    experts = draw(st.sampled_from([2, 8, 128, 300]))
    topk = draw(st.integers(1, min(experts, 4)))
    vocabulary = draw(st.integers(2, 200_000))
    shape = shape_of(
        vocab_size=vocabulary,
        max_position_embeddings=64,
        num_hidden_layers=layers,
        mlp_only_layers=sorted(set(range(layers)) - set(sparse)),
        num_experts=experts,
        num_experts_per_tok=topk,
    )
    tokens = st.integers(0, vocabulary - 1)
    prompt = tuple(draw(st.lists(tokens, min_size=1, max_size=5)))
    output = draw(st.lists(tokens, min_size=1, max_size=5))
    log_probs = draw(st.lists(st.floats(-50, 0, width=32), min_size=len(output), max_size=len(output)))
    first, changed = draw(st.integers(0, 2**40)), draw(st.integers(1, len(output)))
    spans = [{"version": str(first), "start": 0, "end": changed}]
    if changed < len(output):
        spans.append({"version": str(first + 1), "start": changed, "end": len(output)})
    rows = len(prompt) + len(output) - 1
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    chosen = random.permuted(np.tile(np.arange(experts), (rows, layers, 1)), axis=-1)[..., :topk]
    routes = np.ascontiguousarray(chosen, dtype="<i4")
    reply = {
        "output_ids": output,
        "meta_info": {
            "id": "x",
            "finish_reason": {"type": draw(st.sampled_from(["stop", "length", "abort"]))},
            "prompt_tokens": len(prompt),
            "completion_tokens": len(output),
            "weight_versions": spans,
            "output_token_logprobs": [[value, token, None] for value, token in zip(log_probs, output, strict=True)],
            "routed_experts": base64.b64encode(routes.tobytes()).decode(),
        },
    }
    return GenerationRequest("r", prompt, SamplingParams(max_new_tokens=8)), shape, reply, routes


def parse(request, shape, reply):
    return parse_reply(reply, request, shape, sent_as="x", server="http://s", return_routes=True, context_length=64)


@given(cases())
def test_a_right_reply_is_taken_as_it_is(case):
    request, shape, reply, routes = case
    result = parse(request, shape, reply)
    assert result.output_ids.tolist() == reply["output_ids"]
    assert result.behavior_log_probs.tolist() == [row[0] for row in reply["meta_info"]["output_token_logprobs"]]
    spans = reply["meta_info"]["weight_versions"]
    expected = [int(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
    assert result.weight_versions.tolist() == expected
    np.testing.assert_array_equal(result.routes, routes[:, list(shape.moe_layers)])
    assert result.route_versions.tolist() == [expected[0]] * (len(request.prompt_ids) - 1) + expected


@given(cases(), st.data())
def test_a_reply_with_a_part_exchanged_is_taken_or_refused(case, data):
    request, shape, reply, _ = case
    part = data.draw(st.sampled_from(["output_ids", "meta_info", *reply["meta_info"]]))
    (reply if part in reply else reply["meta_info"])[part] = data.draw(JSON)
    try:
        result = parse(request, shape, reply)
    except UserError as error:
        assert "server http://s to request r" in str(error)
        return
    assert len(result.output_ids) == len(result.behavior_log_probs) == len(result.weight_versions)
    assert np.isfinite(result.behavior_log_probs).all()


@given(cases(), st.data())
def test_routes_that_name_an_expert_twice_or_one_that_is_not_there_never_pass(case, data):
    request, shape, reply, routes = case
    assume(len(reply["meta_info"]["weight_versions"]) == 1)
    routes = routes.copy()
    row = data.draw(st.integers(0, len(routes) - 1))
    layer = data.draw(st.sampled_from(shape.moe_layers))
    slot = data.draw(st.integers(0, shape.num_experts_per_tok - 1))
    wrong = [-1, shape.num_experts, 2**31 - 1, -(2**31), *(routes[row, layer, :slot].tolist())]
    routes[row, layer, slot] = data.draw(st.sampled_from(wrong))
    reply["meta_info"]["routed_experts"] = base64.b64encode(routes.tobytes()).decode()
    try:
        parse(request, shape, reply)
    except UserError as error:
        assert "expert" in str(error)
    else:
        raise AssertionError("was taken")
