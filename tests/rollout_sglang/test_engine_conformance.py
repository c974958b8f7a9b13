"""What every `RolloutEngine` promises, held against each: SGLang's real server and the in-process engine."""

from __future__ import annotations

import asyncio
import inspect
import threading
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from rollout_helpers import generate, make_requests

from vespo_megatron.controller.oversampling import BegunGroup, draw_first_whole
from vespo_megatron.controller.sampler import to_sample
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.checksum import WeightChecksum
from vespo_megatron.rollout_sglang.conversation import Conversation
from vespo_megatron.rollout_sglang.engine import GenerationRequest, RolloutEngine, SamplingParams

TOLERANCE = 1e-4
PROTOCOL = [name for name, value in vars(RolloutEngine).items() if callable(value) and not name.startswith("_")]
_seeds = count(1)


def fresh_weights(engine, reference, scale=0.1):
    """Give the engine weights no earlier test gave it; returns a reference that holds them, and their version."""
    seed, version = next(_seeds), engine.weight_version + 1
    engine.update_weights(reference.named_tensors(scale, seed), version)
    return reference.with_weights(reference.named_tensors(scale, seed)), version


@pytest.mark.parametrize("name", PROTOCOL)
def test_an_engine_takes_what_the_protocol_says(engine, name):
    """Parameters, their kinds and defaults, and whether it is a coroutine."""
    promised, given = getattr(RolloutEngine, name), getattr(type(engine), name)
    assert list(inspect.signature(given).parameters.values()) == list(inspect.signature(promised).parameters.values())
    assert inspect.iscoroutinefunction(given) is inspect.iscoroutinefunction(promised)


def test_an_engine_tells_what_it_is_and_holds(engine):
    assert set(RolloutEngine.__annotations__) == {"description", "weight_version", "context_length"}
    assert isinstance(engine.description, str) and engine.description
    assert isinstance(engine.weight_version, int) and engine.context_length == 128


def test_results_come_in_order_with_one_number_of_each_kind_per_token(engine):
    requests = make_requests(24, max_new_tokens=9)
    arrived = []
    results = generate(engine, requests, on_result=arrived.append)
    assert [result.request_id for result in results] == [request.request_id for request in requests]
    assert sorted(result.request_id for result in arrived) == sorted(request.request_id for request in requests)
    for request, result in zip(requests, results, strict=True):
        assert result.output_ids.dtype == np.int64 and result.behavior_log_probs.dtype == np.float32
        assert len(result.output_ids) == len(result.behavior_log_probs) == len(result.weight_versions) == 9
        assert result.finish_reason == "length"
        assert result.routes.dtype == np.uint8
        assert result.routes.shape == (len(request.prompt_ids) + 9 - 1, 3, 2)
        assert (result.weight_versions == engine.weight_version).all()
        assert (result.route_versions == engine.weight_version).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_routes_are_those_of_transformers_for_the_same_weights(engine, reference, temperature):
    expected, version = fresh_weights(engine, reference)
    requests = make_requests(12, temperature=temperature)
    for request, result in zip(requests, generate(engine, requests), strict=True):
        log_probs, routes = expected.score(request, result, temperature)
        np.testing.assert_allclose(result.behavior_log_probs, log_probs, atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(np.sort(result.routes, -1), routes)
        assert (result.weight_versions == version).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_response_is_scored_again_in_one_pass(engine, reference, temperature):
    """Engines that score at temperature 1 alone say so for others."""
    expected, _ = fresh_weights(engine, reference)
    requests = make_requests(6, temperature=temperature)
    results = generate(engine, requests)
    drawn = [
        (np.array(request.prompt_ids), result.output_ids) for request, result in zip(requests, results, strict=True)
    ]
    scored = asyncio.run(engine.score(drawn, temperature))
    for request, result, score in zip(requests, results, scored, strict=True):
        if temperature != 1 and score.log_probs is None:
            continue
        log_probs, _ = expected.score(request, result, temperature)
        assert score.log_probs.dtype == np.float32
        told = ~np.isnan(score.log_probs)
        assert (told | (result.output_ids == expected.model.config.vocab_size - 1)).all()
        np.testing.assert_allclose(score.log_probs[told], log_probs[told], atol=TOLERANCE, rtol=0)
        if score.hidden is not None:
            assert score.hidden.shape == (3, len(result.output_ids), expected.model.config.hidden_size)
            np.testing.assert_allclose(score.hidden, expected.hidden(request, result), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_k": 5},
        {"top_k": 20, "top_p": 0.7, "temperature": 0.6},
        {"top_p": 0.8},
        {"min_p": 0.05, "temperature": 1.3},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.02},
        {"top_k": 1},
    ],
    ids=str,
)
def test_truncated_sampling_reports_the_distribution_it_drew_from(engine, reference, sampling):
    """Against softmax, sort and cumulative sum of transformers' logits, in float64."""
    expected, _ = fresh_weights(engine, reference)
    requests = make_requests(12, **sampling)
    for request, result in zip(requests, generate(engine, requests), strict=True):
        probs = expected.distributions(request, result, sampling.get("temperature", 1.0))
        log_probs = truncated_log_probs(probs, **sampling)
        drawn = log_probs[np.arange(len(result.output_ids)), result.output_ids]
        np.testing.assert_allclose(result.behavior_log_probs, drawn, atol=TOLERANCE, rtol=0)
        kept = np.zeros_like(probs, dtype=bool)
        kept[result.sampling_mask.owners, result.sampling_mask.ids] = True
        np.testing.assert_array_equal(kept, np.isfinite(log_probs))


def test_a_truncated_response_in_turns_keeps_what_each_token_was_drawn_from(engine):
    request = make_requests(1, group_size=1, max_new_tokens=9, top_k=3)[0]
    conversation = Conversation(request, context_length=engine.context_length)
    first = replace(conversation.next_request(), sampling=replace(request.sampling, max_new_tokens=4))
    conversation.add(generate(engine, [first])[0])
    conversation.observe([7, 8])
    conversation.add(generate(engine, [conversation.next_request()])[0])
    result = conversation.result()
    assert result.sampling_mask.counts.tolist() == [3] * 4 + [0] * 2 + [3] * 5
    assert result.sampling_mask.contains(result.output_ids).all()


def truncated_log_probs(probs, top_k=-1, top_p=1.0, min_p=0.0, temperature=1.0):
    """log of `probs` [R, vocabulary] renormalised over what top-k, top-p (of all mass) and min-p leave."""
    result = np.full_like(probs, -np.inf)
    for row, kept in zip(probs, result, strict=True):
        chosen, mass = [], 0.0
        for rank, token in enumerate(np.argsort(-row, kind="stable")):
            if (top_k == -1 or rank < top_k) and mass <= top_p and row[token] >= min_p * row.max():
                chosen.append(token)
            mass += row[token]
        kept[chosen] = np.log(row[chosen] / row[chosen].sum())
    return result


def test_a_response_drawn_in_turns_equals_one_drawn_at_once(engine, reference):
    """Greedy, so that there is one right answer: tokens, log-probs, routes and versions of 3 turns and of 1."""
    fresh_weights(engine, reference)
    whole_request = make_requests(1, group_size=1, max_new_tokens=24, temperature=0.0)[0]
    (whole,) = generate(engine, [whole_request])
    conversation = Conversation(whole_request, context_length=engine.context_length)
    turns = 0
    while (turn := conversation.next_request()) is not None:
        part = replace(turn, sampling=replace(turn.sampling, max_new_tokens=min(8, turn.sampling.max_new_tokens)))
        conversation.add(generate(engine, [part])[0])
        turns += 1
    joined = conversation.result()
    assert turns == 3 and conversation.loss_mask().all()
    np.testing.assert_array_equal(joined.output_ids, whole.output_ids)
    np.testing.assert_allclose(joined.behavior_log_probs, whole.behavior_log_probs, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(np.sort(joined.routes, -1), np.sort(whole.routes, -1))
    np.testing.assert_array_equal(joined.weight_versions, whole.weight_versions)


def test_what_the_environment_says_is_part_of_the_response_and_of_what_follows(engine, reference):
    expected, _ = fresh_weights(engine, reference)
    request = make_requests(1, group_size=1, max_new_tokens=10)[0]
    conversation = Conversation(request, context_length=engine.context_length)
    first = replace(conversation.next_request(), sampling=replace(request.sampling, max_new_tokens=4))
    conversation.add(generate(engine, [first])[0])
    conversation.observe([7, 8, 9])
    conversation.add(generate(engine, [conversation.next_request()])[0])
    result, mask = conversation.result(), conversation.loss_mask()
    assert len(result.output_ids) == 13 and mask.tolist() == [True] * 4 + [False] * 3 + [True] * 6
    assert conversation.next_request() is None
    log_probs, routes = expected.score(request, result)
    np.testing.assert_allclose(result.behavior_log_probs[mask], log_probs[mask], atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(np.sort(result.routes, -1), routes)


def test_of_groups_begun_together_the_first_whole_ones_are_taken_and_the_rest_goes_on_later(engine, reference):
    """Two groups of ten tokens and two of ninety: the short ones end the rollout, the long ones go on from there."""
    expected, _ = fresh_weights(engine, reference)
    groups = []
    for number, request in enumerate(make_requests(4, group_size=1, longest_prompt=20)):
        sampling = replace(request.sampling, max_new_tokens=10 if number % 2 else 90)
        pair = [replace(request, request_id=f"{request.request_id}-{i}", sampling=sampling, seed=i) for i in range(2)]
        conversations = [Conversation(each, context_length=engine.context_length) for each in pair]
        groups.append(BegunGroup(PromptRecord(f"p{number}", request.prompt_ids, "s", "4"), conversations))

    async def no_weights(need):
        raise need

    def draw(wanted):
        drawing = draw_first_whole(engine, groups, wanted, seed=7, wait_for_weights=no_weights)
        return asyncio.run(asyncio.wait_for(drawing, 120))

    assert draw(2) == groups[1::2]
    lengths = [len(each.loss_mask()) for group in groups[0::2] for each in group.conversations]
    assert all(length < 90 for length in lengths), "they were not ended"
    assert draw(4) == groups
    for group in groups:
        for conversation in group.conversations:
            result = conversation.result()
            assert result.finish_reason == "length" and conversation.loss_mask().all()
            log_probs, routes = expected.score(conversation.request, result)
            np.testing.assert_allclose(result.behavior_log_probs, log_probs, atol=TOLERANCE, rtol=0)
            np.testing.assert_array_equal(np.sort(result.routes, -1), routes)


def test_evaluation_runs_beside_training(engine):
    training = make_requests(12, max_new_tokens=12)
    evaluation = [
        replace(request, request_id=f"e{request.request_id}", evaluation=True)
        for request in make_requests(6, max_new_tokens=6, temperature=0.0)
    ]

    async def both():
        return await asyncio.gather(engine.generate(training), engine.generate(evaluation))

    first, second = asyncio.run(asyncio.wait_for(both(), 120))
    assert [len(result.output_ids) for result in first] == [12] * 12
    assert [len(result.output_ids) for result in second] == [6] * 6


def test_an_update_changes_log_probs_though_prompts_were_cached(engine, reference):
    """The prefix cache of the old weights must not survive them."""
    request = make_requests(1, group_size=1, max_new_tokens=4, temperature=0.0)
    for _ in range(2):
        expected, _ = fresh_weights(engine, reference, scale=0.3)
        for _ in range(2):  # the second time from the cache
            (result,) = generate(engine, request)
            log_probs, routes = expected.score(request[0], result)
            np.testing.assert_allclose(result.behavior_log_probs, log_probs, atol=TOLERANCE, rtol=0)
            np.testing.assert_array_equal(np.sort(result.routes, -1), routes)


def test_the_checksum_is_that_of_the_streamed_tensors(engine, reference):
    total = WeightChecksum()
    for name, tensor in reference.named_tensors(0.1, seed=77):
        total.add(name, tensor)
    checksum = engine.update_weights(reference.named_tensors(0.1, seed=77), engine.weight_version + 1)
    assert checksum == total.hexdigest()


def test_the_stream_is_consumed_once_and_never_collected(engine, reference):
    """A tensor is free to be reused by the trainer as soon as the next one is asked for."""
    import weakref

    alive = []

    def stream():
        for name, tensor in reference.named_tensors():
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            assert sum(ref() is not None for ref in alive) <= 2, "the engine keeps tensors it was given"

    engine.update_weights(stream(), engine.weight_version + 1)


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen", "twice"])
def test_an_incomplete_update_is_an_error_and_nothing_is_sampled_until_one_succeeds(engine, reference, fault):
    def stream():
        tensors = list(reference.named_tensors())
        name, tensor = tensors[7]
        if fault == "missing":
            del tensors[7]
        elif fault == "extra":
            tensors.insert(7, ("model.layers.9.nothing.weight", tensor))
        elif fault == "misshapen":
            tensors[7] = (name, tensor.flatten()[1:])
        else:
            tensors.insert(8, (name, tensor))
        yield from tensors

    with pytest.raises(UserError):
        engine.update_weights(stream(), engine.weight_version + 1)
    with pytest.raises(UserError):
        generate(engine, make_requests(1))
    assert not asyncio.run(engine.health())
    engine.update_weights(reference.named_tensors(), engine.weight_version + 1)
    assert asyncio.run(engine.health())
    assert len(generate(engine, make_requests(2))) == 2


@pytest.mark.parametrize(
    ("prompt", "sampling", "says"),
    [
        ((3, 128), {}, "token id 128"),
        ((3, -1), {}, "token id -1"),
        ((), {}, "0 prompt tokens"),
        ((3,) * 128, {}, "128 prompt tokens"),
        ((3,), {"max_new_tokens": 0}, "max_new_tokens 0"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_name_and_the_engine_lives_on(engine, prompt, sampling, says):
    bad = GenerationRequest("the-bad-one", prompt, SamplingParams(**({"max_new_tokens": 4} | sampling)))
    with pytest.raises(UserError, match=says) as caught:
        generate(engine, [*make_requests(2), bad])
    assert "the-bad-one" in str(caught.value)
    assert len(generate(engine, make_requests(2))) == 2


def test_a_response_is_cut_at_the_context(engine):
    requests = [
        GenerationRequest(f"p{length}", (5,) * length, SamplingParams(max_new_tokens=1000)) for length in (120, 127)
    ]
    results = generate(engine, requests)
    assert [len(result.output_ids) for result in results] == [8, 1]
    assert [result.finish_reason for result in results] == ["length", "length"]


def test_a_stop_token_ends_a_response_and_stays_in_it(engine):
    stops = tuple(range(2, 128, 3))
    results = generate(engine, make_requests(16, max_new_tokens=30, stop_token_ids=stops))
    assert {result.finish_reason for result in results} >= {"stop"}
    for result in results:
        ends = {*stops, 1}  # SGLang also stops at the model's own end-of-sequence token
        assert not ends & set(result.output_ids[:-1].tolist()) - {1}
        if result.finish_reason == "stop":
            assert result.output_ids[-1] in ends
            assert len(result.behavior_log_probs) == len(result.output_ids)


def test_either_of_two_stop_tokens_ends_a_response_and_is_trained_on(engine):
    requests = make_requests(96, max_new_tokens=60, stop_token_ids=(1, 9))
    samples = [
        to_sample(result, PromptRecord("p", request.prompt_ids, "set", "4"))
        for request, result in zip(requests, generate(engine, requests), strict=True)
        if result.finish_reason == "stop"
    ]
    assert {int(sample.response_ids[-1]) for sample in samples} == {1, 9}
    for sample in samples:
        assert sample.loss_mask.all() and len(sample.loss_mask) == len(sample.behavior_log_probs)
        assert not {1, 9} & set(sample.response_ids[:-1].tolist())


def test_without_stop_tokens_nothing_stops_a_response(engine):
    results = generate(engine, make_requests(32, max_new_tokens=40))
    assert {len(result.output_ids) for result in results} == {40}


def test_greedy_is_repeatable(engine):
    requests = make_requests(4, temperature=0.0)
    first, second = generate(engine, requests), generate(engine, requests)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.output_ids, b.output_ids)


def test_pause_ends_what_runs_as_abort_and_holds_back_what_comes(engine):
    async def scenario():
        running = asyncio.create_task(engine.generate(make_requests(16, max_new_tokens=80)))
        await asyncio.sleep(0.15)
        await asyncio.wait_for(engine.pause(), 60)
        ended = await asyncio.wait_for(running, 60)
        waiting = asyncio.create_task(engine.generate(make_requests(2, max_new_tokens=4)))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await engine.resume()
        return ended, await asyncio.wait_for(waiting, 60)

    ended, later = asyncio.run(scenario())
    for result in ended:
        assert result.finish_reason in ("abort", "length")
        assert len(result.behavior_log_probs) == len(result.output_ids)
    assert [result.finish_reason for result in later] == ["length", "length"]


def test_weights_can_be_updated_while_paused_and_serve_after_resume(engine, reference):
    asyncio.run(engine.pause())
    expected, version = fresh_weights(engine, reference)
    asyncio.run(engine.resume())
    requests = make_requests(2)
    for request, result in zip(requests, generate(engine, requests), strict=True):
        np.testing.assert_allclose(
            result.behavior_log_probs, expected.score(request, result)[0], atol=TOLERANCE, rtol=0
        )
        assert (result.weight_versions == version).all()


def test_an_update_waits_for_running_requests(engine, reference):
    async def scenario():
        running = asyncio.create_task(engine.generate(make_requests(8, max_new_tokens=60)))
        await asyncio.sleep(0.1)
        before = engine.weight_version
        await asyncio.to_thread(engine.update_weights, reference.named_tensors(0.1, next(_seeds)), before + 1)
        return before, await running

    before, results = asyncio.run(scenario())
    for result in results:
        assert (result.weight_versions == before).all() and result.finish_reason == "length"


@pytest.mark.parametrize("paused", [False, True])
def test_what_comes_during_an_update_waits_for_it(engine, reference, paused):
    """Paused, it is what the update has interrupted: a conversation goes on at once."""
    under_way, go_on = threading.Event(), threading.Event()

    def stream():
        tensors = reference.named_tensors(0.1, next(_seeds))
        yield next(tensors)
        under_way.set()
        assert go_on.wait(60)
        yield from tensors

    async def scenario():
        if paused:
            await engine.pause()
        version = engine.weight_version + 1
        update = asyncio.create_task(asyncio.to_thread(engine.update_weights, stream(), version))
        assert await asyncio.to_thread(under_way.wait, 60)
        coming = asyncio.create_task(engine.generate(make_requests(2, max_new_tokens=4)))
        await asyncio.sleep(0.1)
        assert not coming.done()
        go_on.set()
        await asyncio.wait_for(update, 60)
        if paused:
            await engine.resume()
        return version, await asyncio.wait_for(coming, 60)

    version, results = asyncio.run(scenario())
    for result in results:
        assert (result.weight_versions == version).all() and result.finish_reason == "length"
