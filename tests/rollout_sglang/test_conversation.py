"""Turns joined to one response: each token's log-prob, version and routes are of the turn that drew it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vespo_megatron.controller.sampler import to_sample
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.sample import UNKNOWN_VERSION
from vespo_megatron.rollout_sglang.conversation import Conversation
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult, SamplingParams
from vespo_megatron.routing_replay.table import stale_rows

PROMPT = (1, 2, 3)


def answer(turn, number, versions, *, routes=True, reason="abort"):
    """What an engine draws for `turn`: tokens 100·number + index, routes [[number, row]] of each row from its start."""
    count, start = len(versions), turn.routes_start
    rows = np.arange(start, len(turn.prompt_ids) + count - 1)
    of_rows = [*[versions[0]] * (len(turn.prompt_ids) - 1), *versions][start:] if count else []
    return GenerationResult(
        turn.request_id,
        np.arange(count) + 100 * number,
        np.full(count, -float(number), np.float32),
        np.array(versions, dtype=np.int64),
        reason,
        routes=np.stack([np.full(len(rows), number), rows], -1)[:, None].astype(np.uint8) if routes and count else None,
        route_versions=np.array(of_rows) if routes and count else None,
    )


@st.composite
def conversations(draw):
    """Turns of tokens by ascending versions, and how many tokens an environment says after each."""
    version, turns = 0, []
    for _ in range(draw(st.integers(1, 5))):
        versions = []
        for _ in range(draw(st.integers(0, 4))):
            version += draw(st.sampled_from([0, 0, 1]))
            versions.append(version)
        turns.append((versions, draw(st.sampled_from([0, 0, 1, 3]))))
        version += draw(st.sampled_from([0, 1]))
    return turns


@given(conversations())
def test_a_row_is_of_the_turn_that_first_ran_it_and_of_the_weights_that_drew_the_token_after_it(turns):
    conversation = Conversation(GenerationRequest("r", PROMPT, SamplingParams(1000)), context_length=1000)
    expected = []
    for number, (versions, observed) in enumerate(turns, start=1):
        conversation.add(answer(conversation.next_request(), number, versions))
        expected += [(number, version) for version in versions]
        conversation.observe(range(observed))
        expected += [None] * observed
    if expected and expected[-1] is None:
        conversation.add(answer(conversation.next_request(), len(turns) + 1, [99]))
        expected.append((len(turns) + 1, 99))
    result = conversation.result()
    if not any(each is not None for each in expected):
        assert result.routes is None and result.route_versions is None
        return
    for index in reversed(range(len(expected))):  # what was said is read first by the turn that draws the next token
        expected[index] = expected[index] or expected[index + 1]
    turn_of_row = [expected[0][0]] * (len(PROMPT) - 1) + [number for number, _ in expected]
    assert result.routes[:, 0].tolist() == [[number, row] for row, number in enumerate(turn_of_row)]
    versions = [version for _, version in expected]
    assert result.weight_versions.tolist() == versions
    assert result.route_versions.tolist() == [versions[0]] * (len(PROMPT) - 1) + versions
    assert not stale_rows(to_sample(result, PromptRecord("p", PROMPT, "s", "4"))).any()


def test_what_no_turn_has_run_has_routes_of_no_version():
    """The environment spoke, and new weights ended the next turn before its first token."""
    conversation = Conversation(GenerationRequest("r", PROMPT, SamplingParams(9)), context_length=100)
    conversation.add(answer(conversation.next_request(), 1, [4, 4]))
    conversation.observe([7, 8])
    conversation.add(answer(conversation.next_request(), 2, []))
    result = conversation.result()
    assert result.route_versions.tolist() == [4, 4, 4, 4, UNKNOWN_VERSION, UNKNOWN_VERSION]
    assert result.weight_versions.tolist() == [4, 4, 4, 4] and not conversation.loss_mask()[2:].any()


def test_an_engine_without_routes_has_none():
    conversation = Conversation(GenerationRequest("r", PROMPT, SamplingParams(9)), context_length=100)
    conversation.add(answer(conversation.next_request(), 1, [4, 4], routes=False))
    assert conversation.next_request().routes_start == 0 and conversation.result().routes is None
