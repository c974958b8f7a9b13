"""SGLang's real server: weight sync that can be believed, faults in it, its end, and what it is on this machine."""

from __future__ import annotations

import asyncio
import copy
import os
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
from listening_sockets import listening
from rollout_helpers import Reference, generate, make_requests

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang import connect, launch_servers
from vespo_megatron.rollout_sglang.conversation import Conversation

pytestmark = pytest.mark.sglang


@pytest.fixture(autouse=True)
def good_weights_afterwards(request, reference):
    """A test that spoils the shared server's weights does not spoil the next test."""
    yield
    if "sglang_engine" in request.fixturenames:
        engine = request.getfixturevalue("sglang_engine")
        if not asyncio.run(engine.health()):
            engine.update_weights(reference.named_tensors(), engine.weight_version + 1)


def test_the_engine_says_which_sglang_it_is(sglang_engine, sglang_servers):
    assert sglang_engine.description == f"SGLang 0.5.23 at {sglang_servers.urls[0]} (cpu)"


def test_a_server_that_refuses_a_bucket_does_not_hang_the_broadcast(sglang_engine, reference, monkeypatch):
    """It answers 400 without joining the broadcast: outside a session, for instance."""
    send, client = sglang_engine.sync.transport.send, sglang_engine.clients[0]

    def close_the_session_first(bucket):
        client.call("/end_weight_update", {})
        return send(bucket)

    monkeypatch.setattr(sglang_engine.sync.transport, "send", close_the_session_first)
    start = time.monotonic()
    with pytest.raises(UserError, match="answered 400: .*begin_weight_update"):
        sglang_engine.update_weights(reference.named_tensors(), sglang_engine.weight_version + 1)
    assert time.monotonic() - start < 10


def test_a_stream_that_fails_leaves_nothing_hanging(sglang_engine, reference):
    def stream():
        for index, item in enumerate(reference.named_tensors()):
            if index == 40:
                raise ValueError("the trainer's own trouble")
            yield item

    start = time.monotonic()
    with pytest.raises(ValueError, match="own trouble"):
        sglang_engine.update_weights(stream(), sglang_engine.weight_version + 1)
    assert time.monotonic() - start < 10
    with pytest.raises(UserError, match="did not arrive whole"):
        generate(sglang_engine, make_requests(1))


def test_the_server_is_paused_while_its_weights_are_not_whole(sglang_engine, reference, tiny_recipe):
    """A foreign client gets nothing from half-updated weights either."""
    other = connect(tiny_recipe, [sglang_engine.clients[0].url])
    other.clients[0].request_timeout_s = 1.0

    def stream():
        for index, item in enumerate(reference.named_tensors()):
            if index == 40:
                with pytest.raises(UserError, match="did not answer"):
                    generate(other, make_requests(1))
            yield item

    sglang_engine.update_weights(stream(), sglang_engine.weight_version + 1)
    other.close()


def test_the_weight_group_leaves_the_default_process_group_alone(sglang_engine, reference, tmp_path):
    """megatron-core owns the default group, and the sync must work with it and without it."""
    import torch.distributed as dist

    sglang_engine.sync._disconnect()
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        groups = dict(dist.distributed_c10d._world.pg_names)
        sglang_engine.update_weights(reference.named_tensors(), sglang_engine.weight_version + 1)
        assert dist.distributed_c10d._world.pg_names == groups
        assert dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()
    sglang_engine.update_weights(reference.named_tensors(), sglang_engine.weight_version + 1)


def test_other_servers_join_a_new_group_with_the_next_update(sglang_engine, reference):
    """After `set_servers` nothing of the old group is used, though the same server is in both."""
    sync = sglang_engine.sync
    names = []
    for _ in range(2):
        sync.set_servers(sglang_engine.clients)
        sglang_engine.update_weights(reference.named_tensors(), sglang_engine.weight_version + 1)
        names.append(sync.transport.group.name)
    assert names[0] != names[1]


def test_weights_of_another_dtype_are_cast_to_the_servers(sglang_engine, reference):
    import torch

    def stream(dtype):
        for name, tensor in reference.named_tensors(0.1, seed=9):
            yield name, tensor.to(torch.bfloat16).to(dtype)

    checksums = [
        sglang_engine.update_weights(stream(dtype), sglang_engine.weight_version + 1)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert checksums[0] == checksums[1]


def test_a_request_past_its_own_deadline_comes_back_with_what_it_has(sglang_engine, reference):
    """And goes on from there; the others of its call are left alone."""
    expected = reference.with_weights(reference.named_tensors())
    sglang_engine.update_weights(reference.named_tensors(), sglang_engine.weight_version + 1)
    hurried, patient = (replace(r, group_id="g") for r in make_requests(2, max_new_tokens=100, longest_prompt=12))
    hurried = replace(hurried, deadline_s=0.2)
    first, second = generate(sglang_engine, [hurried, patient])
    assert first.finish_reason == "abort" and 0 < len(first.output_ids) < 100
    assert second.finish_reason == "length" and len(second.output_ids) == 100
    conversation = Conversation(hurried, context_length=sglang_engine.context_length)
    conversation.add(first)
    conversation.add(generate(sglang_engine, [replace(conversation.next_request(), deadline_s=None)])[0])
    whole = conversation.result()
    assert whole.finish_reason == "length" and len(whole.output_ids) == 100
    for request, result in ((hurried, first), (hurried, whole)):
        log_probs, routes = expected.score(request, result)
        np.testing.assert_allclose(result.behavior_log_probs, log_probs, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(np.sort(result.routes, -1), routes)


def test_concurrent_groups_reach_the_batch_sizes_that_make_it_fast(sglang_engine):
    """256 requests run side by side, not one after another: the time of a few, not of 256."""
    start = time.monotonic()
    generate(sglang_engine, make_requests(1, group_size=1, max_new_tokens=32))
    one = time.monotonic() - start
    start = time.monotonic()
    results = generate(sglang_engine, make_requests(256, group_size=8, max_new_tokens=32))
    many = time.monotonic() - start
    assert sum(len(result.output_ids) for result in results) == 256 * 32
    print(f"one request {32 / one:.0f} tokens/s, 256 requests {256 * 32 / many:.0f} tokens/s")
    assert many < 128 * one


def test_a_server_that_dies_at_start_ends_with_sglangs_reason_and_leaves_nothing(tiny_recipe, tmp_path):
    recipe = tiny_recipe.with_values({"policy.generation.sglang_cfg.server_args": {"no_such_flag": 1}})
    with pytest.raises(UserError, match="no-such-flag") as caught:
        launch_servers(recipe, tmp_path)
    assert "server_0.log" in str(caught.value)
    assert not [p for p in psutil.Process().children(recursive=True) if str(tmp_path) in " ".join(p.cmdline())]


def test_two_ranks_hold_a_tied_model_between_them_and_nothing_of_them_is_left(reference, tiny_recipe, tmp_path):
    """Tensor parallel 2 and a tied head: every slice is checked; then a rank is killed, and then all are stopped."""
    tied = copy.deepcopy(reference.model.config)
    tied.tie_word_embeddings = True
    folder = tmp_path / "tied"
    tied.save_pretrained(folder)
    tensors = [(name, tensor) for name, tensor in reference.named_tensors() if name != "lm_head.weight"]
    save(tensors, folder)
    recipe = tiny_recipe.with_values(
        {"policy.model_name": str(folder), "policy.generation.sglang_cfg.tensor_parallel_size": 2}
    )
    with launch_servers(recipe, tmp_path) as servers:
        engine = connect(recipe, servers.urls)
        with pytest.raises(UserError, match="tied output head"):
            generate(engine, make_requests(1))
        engine.update_weights(tensors, 1)
        assert {len(ranks) for ranks in engine.sync._manifests} == {2}
        expected = load(folder)
        requests = make_requests(6)
        for request, result in zip(requests, generate(engine, requests), strict=True):
            log_probs, routes = expected.score(request, result)
            np.testing.assert_allclose(result.behavior_log_probs, log_probs, atol=1e-4, rtol=0)
            np.testing.assert_array_equal(np.sort(result.routes, -1), routes)

        group = [p for p in psutil.process_iter() if os.getpgid(p.pid) == servers.servers[0].process_group]
        assert len(group) >= 5  # supervisor, server, two ranks, detokenizer
        found = listening(group)  # HTTP, each rank's gloo groups and the weights', and a queue between the ranks
        assert len(found) > 2 and {address for address, _ in found} == {"127.0.0.1"}, found
        rank = next(p for p in group if "scheduler" in " ".join(p.cmdline()))
        rank.kill()
        start = time.monotonic()
        with pytest.raises(UserError) as caught:
            generate(engine, requests)
        assert time.monotonic() - start < 30 and servers.urls[0] in str(caught.value)
        engine.close()
    assert not [p for p in group if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def save(tensors, folder):
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def load(folder):
    from transformers import Qwen3MoeForCausalLM

    return Reference(Qwen3MoeForCausalLM.from_pretrained(folder, dtype="float32").eval(), str(folder))
