"""The in-process engine against plain transformers forwards of the same random Qwen3-MoE."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
import torch
from rollout_helpers import CONTEXT, VOCAB

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.checksum import WeightChecksum, tensor_checksum
from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams
from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine

STOP = 5


@pytest.fixture(scope="module")
def engine(model_folder):
    engine = InProcessEngine(model_folder)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(model_folder):
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM.from_pretrained(model_folder, dtype=torch.float32, experts_implementation="eager").eval()


def make_requests(count, *, stop=(STOP,), max_new_tokens=20, first_seed=0, **sampling):
    """Ragged prompts, in pairs that share one."""
    generator = np.random.default_rng(3)
    prompts = [tuple(generator.integers(0, VOCAB, size=generator.integers(1, 30)).tolist()) for _ in range(count)]
    params = SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=stop, **sampling)
    return [
        GenerationRequest(f"r{index}", prompts[index // 2], params, seed=first_seed + index) for index in range(count)
    ]


def generate(engine, requests, **keywords):
    return asyncio.run(engine.generate(requests, **keywords))


def plain_forward(reference, request, result, temperature=1.0):
    """Log-probs [R] and experts [P + R, moe_layers, topk] of one unpadded forward."""
    ids = torch.tensor([[*request.prompt_ids, *result.output_ids.tolist()]])
    with torch.no_grad():
        output = reference(input_ids=ids, output_router_logits=True)
    log_probs = torch.log_softmax(output.logits[0] / temperature, dim=-1)
    taken = log_probs[len(request.prompt_ids) - 1 : -1].gather(1, torch.tensor(result.output_ids)[:, None])[:, 0]
    experts = torch.stack([logits.topk(2, dim=-1).indices for logits in output.router_logits], dim=1)
    return taken.numpy(), experts.numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_routes_are_those_of_a_plain_transformers_forward(engine, reference, temperature):
    requests = make_requests(24, temperature=temperature)
    results = generate(engine, requests)
    assert {result.finish_reason for result in results} == {"stop", "length"}
    assert len({len(result.output_ids) for result in results}) > 3
    for request, result in zip(requests, results, strict=True):
        assert result.request_id == request.request_id
        log_probs, experts = plain_forward(reference, request, result, temperature)
        np.testing.assert_allclose(result.behavior_log_probs, log_probs, atol=1e-5)
        assert result.routes.dtype == np.uint8
        assert result.routes.shape == (len(request.prompt_ids) + len(result.output_ids) - 1, 2, 2)
        np.testing.assert_array_equal(np.sort(result.routes, -1), np.sort(experts[:-1], -1))


@pytest.mark.parametrize("tokens", [1, 5, 32, 33])
def test_experts_of_few_rows_and_of_many_are_transformers_own(engine, tokens):
    from vespo_megatron.rollout_sglang.in_process.experts import run_experts

    mlp = engine._model.model.model.layers[0].mlp
    hidden = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
    _, gates, chosen = mlp.gate(hidden)
    actual = run_experts(mlp.experts, hidden, chosen, gates)
    expected = torch.zeros_like(hidden, dtype=torch.float64)
    gate_up, down = mlp.experts.gate_up_proj.double(), mlp.experts.down_proj.double()
    for token, (experts, weights) in enumerate(zip(chosen, gates.double(), strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = (gate_up[expert] @ hidden[token].double()).chunk(2)
            expected[token] += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    # float32's own rounding, which differs between processors
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=5e-6)


def test_a_response_is_a_function_of_prompt_and_seed_whatever_else_is_in_the_batch(engine, model_folder):
    requests = make_requests(24)
    together = generate(engine, requests)
    again = generate(engine, requests)
    alone = [generate(engine, [request])[0] for request in requests]
    narrow = InProcessEngine(model_folder, max_batch_size=5)
    in_fives = generate(narrow, requests[::-1])[::-1]
    narrow.close()
    for first, second, third, fourth in zip(together, again, alone, in_fives, strict=True):
        np.testing.assert_array_equal(first.behavior_log_probs, second.behavior_log_probs)  # to the last bit
        for other in (second, third, fourth):
            np.testing.assert_array_equal(first.output_ids, other.output_ids)
            np.testing.assert_array_equal(first.routes, other.routes)
            np.testing.assert_allclose(first.behavior_log_probs, other.behavior_log_probs, atol=1e-5)
    assert any(
        len(a.output_ids) != len(b.output_ids) or (a.output_ids != b.output_ids).any()
        for a, b in zip(together[::2], together[1::2], strict=True)
    ), "two seeds of one prompt must differ"


def test_samples_follow_the_distribution_whose_log_probs_are_returned(engine, reference):
    params = SamplingParams(max_new_tokens=1)
    requests = [GenerationRequest(str(seed), (7, 8, 9), params, seed=seed) for seed in range(4000)]
    tokens = np.array([result.output_ids[0] for result in generate(engine, requests)])
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([[7, 8, 9]])).logits[0, -1].softmax(-1).numpy()
    observed = np.bincount(tokens, minlength=VOCAB) / len(tokens)
    deviations = np.abs(observed - expected) / np.sqrt(expected * (1 - expected) / len(tokens) + 1e-6)
    assert deviations.max() < 4.5


def test_the_stop_token_ends_a_response_and_stays_in_it(engine):
    for result in generate(engine, make_requests(40)):
        where = np.flatnonzero(result.output_ids == STOP)
        if result.finish_reason == "stop":
            assert where.tolist() == [len(result.output_ids) - 1]
        else:
            assert where.size == 0
            assert len(result.output_ids) == 20


def test_each_row_keeps_its_own_limit_and_stop_tokens(engine):
    prompt = (3, 4, 5)
    rows = [SamplingParams(3), SamplingParams(9), SamplingParams(30, stop_token_ids=tuple(range(0, VOCAB, 2)))]
    requests = [GenerationRequest(str(index), prompt, row, seed=index) for index, row in enumerate(rows)]
    short, long, even = generate(engine, requests)
    assert (len(short.output_ids), len(long.output_ids)) == (3, 9)
    assert even.finish_reason == "stop"
    assert even.output_ids[-1] % 2 == 0
    assert (even.output_ids[:-1] % 2 == 1).all()


def test_a_response_is_cut_at_the_context_length(engine):
    request = GenerationRequest("long", tuple([9] * 60), SamplingParams(100), seed=1)
    (result,) = generate(engine, [request])
    assert (len(result.output_ids), result.finish_reason) == (CONTEXT - 60, "length")


def test_a_response_that_fills_the_context_ends_there_while_longer_ones_go_on(engine, reference):
    """What has ended stays in the batch until half of it has."""
    full, going = (1,) * (CONTEXT - 3), (2,) * 4
    sampling = SamplingParams(max_new_tokens=40)
    requests = [GenerationRequest(f"r{i}", full if i == 0 else going, sampling, seed=i) for i in range(4)]
    results = generate(engine, requests)
    assert [len(result.output_ids) for result in results] == [3, 40, 40, 40]
    for request, result in zip(requests, results, strict=True):
        log_probs, _ = plain_forward(reference, request, result)
        np.testing.assert_allclose(result.behavior_log_probs, log_probs, atol=1e-4, rtol=0)


def test_greedy_and_top_k_one_draw_the_most_likely_token(engine, reference):
    for sampling in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}):
        (result,) = generate(engine, make_requests(1, stop=(), max_new_tokens=6, **sampling))
        ids = list(make_requests(1)[0].prompt_ids)
        for token in result.output_ids.tolist():
            with torch.no_grad():
                assert token == int(reference(input_ids=torch.tensor([ids])).logits[0, -1].argmax()), sampling
            ids.append(token)


def test_on_result_hears_of_every_response_once(engine):
    heard = []
    results = generate(engine, make_requests(10), on_result=lambda result: heard.append(result.request_id))
    assert sorted(heard) == sorted(result.request_id for result in results)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [((1, VOCAB), f"token id {VOCAB}"), ((-1,), "token id -1"), ((), "0 prompt tokens"), ((1,) * 64, "64 prompt")],
)
def test_a_prompt_that_cannot_be_run_is_refused_by_name(engine, prompt, message):
    with pytest.raises(UserError, match=message) as raised:
        generate(engine, [GenerationRequest("bad-one", prompt, SamplingParams(4))])
    assert "bad-one" in str(raised.value)


def disk_tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_update_weights_changes_what_is_sampled_and_to_what_it_says(model_folder, reference):
    engine = InProcessEngine(model_folder)
    before = engine.weight_checksum()
    requests = make_requests(8)
    old = generate(engine, requests)
    tensors = disk_tensors(model_folder)
    generator = torch.Generator().manual_seed(4)
    moved = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
    after = engine.update_weights(reversed(moved.items()), version=3)
    assert after == engine.weight_checksum() != before
    new = generate(engine, requests)
    assert all((result.weight_versions == 3).all() and (result.route_versions == 3).all() for result in new)
    assert all((result.weight_versions == 0).all() for result in old)
    assert not np.array_equal(old[0].behavior_log_probs, new[0].behavior_log_probs)
    back = engine.update_weights(tensors.items(), version=4)
    assert back == before
    for first, second in zip(old, generate(engine, requests), strict=True):
        np.testing.assert_array_equal(first.behavior_log_probs, second.behavior_log_probs)
    engine.close()


def test_a_new_engine_agrees_with_the_weights_it_was_sent_on_disk(model_folder):
    engine = InProcessEngine(model_folder)
    expected = WeightChecksum()
    for name, tensor in disk_tensors(model_folder).items():
        expected.add(name, tensor)
    assert engine.weight_checksum() == expected.hexdigest()
    engine.close()


@pytest.mark.parametrize("fault", ["unknown", "missing", "misshapen", "twice"])
def test_a_faulty_weight_update_names_the_tensor_and_stops_generation_until_a_good_one(model_folder, fault):
    engine = InProcessEngine(model_folder)
    tensors = disk_tensors(model_folder)
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    stream = [pair for pair in tensors.items() if pair[0] != name]
    if fault == "unknown":
        name = name.replace("experts.5", "experts.8")
        stream.append((name, tensors[name.replace("experts.8", "experts.5")]))
    elif fault == "misshapen":
        stream.append((name, tensors[name].T.contiguous()))
    elif fault == "twice":
        stream += [(name, tensors[name])] * 2
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        engine.update_weights(stream, version=1)
    assert not asyncio.run(engine.health())
    with pytest.raises(UserError, match="version 1 did not arrive whole"):
        generate(engine, make_requests(2))
    engine.update_weights(tensors.items(), version=2)
    assert asyncio.run(engine.health())
    assert generate(engine, make_requests(2))[0].weight_versions[0] == 2
    engine.close()


async def in_the_middle(engine, requests, change):
    """Results of `requests`; `change` runs in a thread once a few steps have been taken."""
    steps, go_on = 0, engine._between_steps

    def count():
        nonlocal steps
        steps += 1
        time.sleep(0.002)
        return go_on()

    engine._between_steps = count
    drawing = asyncio.create_task(engine.generate(requests))
    while steps < 5:
        await asyncio.sleep(0.001)
    await asyncio.to_thread(change)
    return await asyncio.wait_for(drawing, 60)


def test_an_update_in_place_is_for_every_row_between_the_same_two_steps(model_folder):
    engine = InProcessEngine(model_folder)
    moved = {name: tensor * 1.05 for name, tensor in disk_tensors(model_folder).items()}
    requests = make_requests(6, max_new_tokens=24, stop=())
    results = asyncio.run(
        in_the_middle(engine, requests, lambda: engine.update_weights(moved.items(), 1, in_place=True))
    )
    versions = {tuple(result.weight_versions.tolist()) for result in results}
    assert len(versions) == 1 and set(next(iter(versions))) == {0, 1}
    before = InProcessEngine(model_folder)
    drawn = int((results[0].weight_versions == 0).sum())
    for ours, theirs in zip(results, generate(before, requests), strict=True):
        np.testing.assert_array_equal(ours.output_ids[:drawn], theirs.output_ids[:drawn])
        np.testing.assert_array_equal(ours.behavior_log_probs[:drawn], theirs.behavior_log_probs[:drawn])
        assert (ours.behavior_log_probs[drawn:] != theirs.behavior_log_probs[drawn:]).any()
    engine.close(), before.close()


def test_what_stood_still_for_weights_that_did_not_come_whole_ends_with_the_reason(model_folder):
    engine = InProcessEngine(model_folder)

    def fail():
        with pytest.raises(UserError, match="did not come"):
            engine.update_weights({}.items(), 1, in_place=True)

    with pytest.raises(UserError, match="weights of version 1 did not arrive whole"):
        asyncio.run(in_the_middle(engine, make_requests(2, max_new_tokens=24, stop=()), fail))
    engine.close()


def test_a_call_of_several_batches_is_drawn_under_one_version(model_folder):
    engine, versions = InProcessEngine(model_folder, max_batch_size=2), set()
    tensors = disk_tensors(model_folder)

    async def scenario():
        drawing = asyncio.create_task(engine.generate(make_requests(20, max_new_tokens=30)))
        while not engine._generation_lock.has_readers:
            await asyncio.sleep(0)
        await asyncio.to_thread(engine.update_weights, tensors.items(), 1)
        return await drawing

    for result in asyncio.run(scenario()):
        versions |= set(result.weight_versions.tolist())
    assert versions == {0}
    engine.close()


def test_pause_ends_running_requests_as_aborts_whose_tokens_are_whole(engine, reference):
    # A context of 64 leaves too little time to pause in: pause from the first finished response instead.
    requests = make_requests(30, stop=(STOP,), max_new_tokens=34)

    async def scenario():
        task = asyncio.ensure_future(engine.generate(requests))
        while not engine._generation_lock.has_readers:
            await asyncio.sleep(0)
        await engine.pause()
        results = await task
        waiting = asyncio.ensure_future(engine.generate(requests[:2]))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await engine.resume()
        return results, await waiting

    results, after = asyncio.run(scenario())
    assert any(result.finish_reason == "abort" for result in results)
    assert all(result.finish_reason != "abort" for result in after)
    for request, result in zip(requests, results, strict=True):
        log_probs, experts = plain_forward(reference, request, result)
        np.testing.assert_allclose(result.behavior_log_probs, log_probs, atol=1e-5)
        np.testing.assert_array_equal(np.sort(result.routes, -1), np.sort(experts[:-1], -1))


def test_a_folder_of_no_known_family_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        InProcessEngine(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="'gpt2'"):
        InProcessEngine(tmp_path)


def test_checksum_sees_names_values_shapes_and_dtypes_but_not_order_or_strides():
    tensor = torch.arange(6.0).reshape(2, 3)
    same = tensor_checksum("w", tensor)
    assert tensor_checksum("w", tensor.T.contiguous().T) == same
    others = [("v", tensor), ("w", tensor.reshape(3, 2)), ("w", tensor.bfloat16()), ("w", tensor + 1)]
    assert same not in [tensor_checksum(name, other) for name, other in others]
    one, two = WeightChecksum(), WeightChecksum()
    for name in "abc":
        one.add(name, tensor)
    for name in "cab":
        two.add(name, tensor)
    assert one.hexdigest() == two.hexdigest()
    two.add("d", tensor)
    assert one.hexdigest() != two.hexdigest()
