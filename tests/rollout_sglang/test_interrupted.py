"""A response that new weights interrupt three times: every span is that of its own weights, in each engine."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
from rollout_helpers import Reference, make_requests

from vespo_megatron.controller.sampler import to_sample
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.sample import Sample
from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang import connect
from vespo_megatron.rollout_sglang.conversation import Conversation
from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams
from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine
from vespo_megatron.routing_replay.table import apply_stale_policy, stale_rows

UPDATES = 3


@pytest.fixture(params=["in_process", pytest.param("sglang", marks=pytest.mark.sglang)])
def engine(request, reference):
    if request.param == "in_process":
        made = InProcessEngine(reference.folder, context_length=128)
        at_speed = made._between_steps
        made._between_steps = lambda: time.sleep(0.004) is None and at_speed()  # slow enough for three updates
    else:
        made = connect(request.getfixturevalue("tiny_recipe"), request.getfixturevalue("sglang_servers").urls)
    yield made
    made.update_weights(reference.named_tensors(), made.weight_version + 1)
    made.close()


def request() -> GenerationRequest:
    prompt = make_requests(1)[0].prompt_ids
    return GenerationRequest("long", prompt, SamplingParams(90), seed=1)


def weights_of(reference, first):
    """Version → the reference with that version's weights; version `first` has the original ones."""
    steps = {first + number: (0.05 * number, number) for number in range(UPDATES + 1)}
    return {
        version: reference.with_weights(reference.named_tensors(*change) if change[1] else reference.named_tensors())
        for version, change in steps.items()
    }


async def interrupt(engine, reference, first, *, in_place):
    """Three updates while something runs."""
    for number in range(1, UPDATES + 1):
        await asyncio.sleep(0.03)
        tensors = reference.named_tensors(0.05 * number, number)
        if in_place:
            await asyncio.to_thread(lambda t=tensors, n=number: engine.update_weights(t, first + n, in_place=True))
            continue
        await engine.pause()
        await asyncio.to_thread(engine.update_weights, tensors, first + number)
        await engine.resume()


async def draw(engine, reference, first):
    conversation = Conversation(request(), context_length=128)
    updates = asyncio.create_task(interrupt(engine, reference, first, in_place=False))
    while (turn := conversation.next_request()) is not None:
        conversation.add((await engine.generate([turn]))[0])
    await updates
    return conversation.result()


async def draw_in_place(engine, reference, first, interrupt=interrupt):
    updates = asyncio.create_task(interrupt(engine, reference, first, in_place=True))
    (result,) = await engine.generate([request()])
    await updates
    return result


def sample_of(result) -> Sample:
    return to_sample(replace(result, request_id="s"), PromptRecord("p", request().prompt_ids, "set", "4"))


def rows_of_drawn_versions(result):
    """int64 [P + R - 1]: what `route_versions` has to be where no row is stale."""
    return np.concatenate([np.full(len(request().prompt_ids) - 1, result.weight_versions[0]), result.weight_versions])


def test_each_span_has_the_log_probs_and_the_routes_of_its_own_weights(engine, reference):
    first = engine.weight_version + 1
    engine.update_weights(reference.named_tensors(), first)
    result = asyncio.run(draw(engine, reference, first))
    versions = sorted(set(result.weight_versions.tolist()))
    assert versions == list(range(first, first + UPDATES + 1)), versions
    assert (np.diff(result.weight_versions) >= 0).all()
    np.testing.assert_array_equal(result.route_versions, rows_of_drawn_versions(result))
    differ = 0
    for version, model in weights_of(reference, first).items():
        here, rows = result.weight_versions == version, result.route_versions == version
        log_probs, routes = model.score(request(), result)
        np.testing.assert_allclose(result.behavior_log_probs[here], log_probs[here], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(np.sort(result.routes[rows], -1), routes[rows])
        differ += (np.sort(result.routes[~rows], -1) != routes[~rows]).any()
    assert differ == UPDATES + 1, "every version's weights choose others for the rows of the rest"
    sample = sample_of(result)
    assert not stale_rows(sample).any() and apply_stale_policy([sample], "error") == 0


def test_in_place_a_response_runs_on_through_the_updates_with_the_routes_of_each_step(engine, reference):
    """Log-probs and routes are those of a forward whose every row ran by its own weights, on the cache of the rest."""
    first = engine.weight_version + 1
    engine.update_weights(reference.named_tensors(), first)
    result = asyncio.run(draw_in_place(engine, reference, first))
    versions = sorted(set(result.weight_versions.tolist()))
    assert versions[0] == first and len(versions) > 1 and len(result.output_ids) == 90
    np.testing.assert_array_equal(result.route_versions, rows_of_drawn_versions(result))
    log_probs, routes = Reference.score_on_one_cache(weights_of(reference, first), request(), result)
    np.testing.assert_allclose(result.behavior_log_probs, log_probs, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(np.sort(result.routes, -1), routes)
    assert apply_stale_policy([sample_of(result)], "error") == 0


@pytest.mark.sglang
def test_retracted_between_two_updates_the_rows_of_the_first_weights_are_known_as_stale(
    reference, tiny_recipe, sglang_servers
):
    """As under memory pressure: SGLang runs the request again, under the weights there are, from its first token."""
    engine = connect(tiny_recipe, sglang_servers.urls)
    first = engine.weight_version + 1
    engine.update_weights(reference.named_tensors(), first)

    async def interrupt_and_retract(engine, reference, first, *, in_place):
        await interrupt(engine, reference, first, in_place=in_place)
        for path, body in (("/pause_generation", {"mode": "retract"}), ("/continue_generation", {})):
            await asyncio.to_thread(engine.clients[0].call, path, body)

    result = asyncio.run(draw_in_place(engine, reference, first, interrupt_and_retract))
    engine.close()
    versions = result.weight_versions
    assert result.extra["retractions"] == 1 and len(set(versions.tolist())) > 1
    stale = stale_rows(sample_of(result))
    np.testing.assert_array_equal(stale, rows_of_drawn_versions(result) != versions[-1])
    prompt = len(request().prompt_ids)
    rewritten = replace(result, route_versions=np.repeat([first, versions[-1]], [prompt, len(versions) - 1]))
    _, routes = Reference.score_on_one_cache(weights_of(reference, first), request(), rewritten)
    assert (np.sort(result.routes, -1) == routes).all(), "all but the prompt, which the prefix cache had"
    assert stale[prompt], "though a token of the first weights is behind it"
    with pytest.raises(UserError, match="has routes of weights that nobody knows"):
        apply_stale_policy([sample_of(result)], "error")
    kept, left = sample_of(result), sample_of(result)
    assert apply_stale_policy([kept], "live") == 1 and kept.loss_mask.all()
    assert apply_stale_policy([left], "drop") == 1 and not left.loss_mask.any()


@pytest.mark.sglang
def test_more_than_the_server_may_have_at_a_time_goes_on_after_each_pause(tiny_recipe, sglang_servers, reference):
    """Sixteen responses, four at a time, five updates: none waits for a server that waits for it."""
    recipe = tiny_recipe.with_values({"policy.generation.sglang_cfg.max_concurrent_requests": 4})
    engine = connect(recipe, sglang_servers.urls)
    requests = [replace(r, group_id=r.request_id) for r in make_requests(16, max_new_tokens=80)]

    async def draw():
        conversations = [Conversation(request, context_length=128) for request in requests]
        while turns := [turn for turn in (c.next_request() for c in conversations) if turn is not None]:
            results = {result.request_id: result for result in await engine.generate(turns)}
            for conversation in conversations:
                if (turn := conversation.next_request()) is not None:
                    conversation.add(results[turn.request_id])
        return [conversation.result() for conversation in conversations]

    async def everything():
        drawing, pauses = asyncio.create_task(draw()), []
        for _ in range(5):
            await asyncio.sleep(0.3)
            began = time.monotonic()
            await engine.pause()
            version = engine.weight_version + 1
            await asyncio.to_thread(engine.update_weights, reference.named_tensors(0.01, seed=version), version)
            await engine.resume()
            pauses.append(time.monotonic() - began)
        return await drawing, pauses

    results, pauses = asyncio.run(everything())
    engine.close()
    assert all(len(result.output_ids) == 80 for result in results)
    assert max(pauses) < 15, pauses
