"""A response that new weights interrupt three times: every span is that of its own weights, in SGLang's real server."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
from rollout_helpers import make_requests

from vespo_megatron.data.sample import Sample
from vespo_megatron.rollout_sglang import connect
from vespo_megatron.rollout_sglang.conversation import Conversation
from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams
from vespo_megatron.routing_replay.table import apply_stale_policy, stale_rows

pytestmark = pytest.mark.sglang
UPDATES = 3


@pytest.fixture
def engine(tiny_recipe, sglang_servers, reference):
    made = connect(tiny_recipe, sglang_servers.urls)
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


def test_each_span_has_the_log_probs_of_its_own_weights_and_no_route_is_of_another_version(engine, reference):
    first = engine.weight_version + 1
    engine.update_weights(reference.named_tensors(), first)
    result = asyncio.run(draw(engine, reference, first))
    versions = sorted(set(result.weight_versions.tolist()))
    assert versions == list(range(first, first + UPDATES + 1)), versions
    assert (np.diff(result.weight_versions) >= 0).all()
    for version, model in weights_of(reference, first).items():
        here = result.weight_versions == version
        np.testing.assert_allclose(
            result.behavior_log_probs[here], model.score(request(), result)[0][here], atol=1e-4, rtol=0
        )
    assert result.routes_version == versions[-1]
    sample = Sample(
        "s",
        "p",
        request().prompt_ids,
        result.output_ids,
        result.behavior_log_probs,
        result.weight_versions,
        result.finish_reason,
        result.routes,
        result.routes_version,
    )
    stale = stale_rows(sample)
    assert stale[: len(sample.prompt_ids)].all() and not stale[-1]
    assert apply_stale_policy([sample], "live") == 1


def test_in_place_a_response_runs_on_through_the_updates(engine, reference):
    first = engine.weight_version + 1

    async def run():
        updates = asyncio.create_task(interrupt(engine, reference, first, in_place=True))
        (result,) = await engine.generate([request()])
        await updates
        return result

    engine.update_weights(reference.named_tensors(), first)
    result = asyncio.run(run())
    versions = sorted(set(result.weight_versions.tolist()))
    assert versions[0] == first and len(versions) > 1 and len(result.output_ids) == 90
    assert result.routes is None, "no one version would be true of them"
    here = result.weight_versions == first  # before the first update the cache is of one version
    np.testing.assert_allclose(
        result.behavior_log_probs[here],
        weights_of(reference, first)[first].score(request(), result)[0][here],
        atol=1e-4,
        rtol=0,
    )


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
