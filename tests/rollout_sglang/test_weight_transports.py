"""Each transport into SGLang's real server: the same weights arrive, and a bucket that was corrupted is never used."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from rollout_helpers import generate, make_requests

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang import connect
from vespo_megatron.rollout_sglang.checksum import WeightChecksum
from vespo_megatron.rollout_sglang.faults import ChecksumMismatch, WeightsNeeded, faults_of
from vespo_megatron.rollout_sglang.weight_sync import factory

pytestmark = pytest.mark.sglang
TRANSPORTS = ("distributed", "tensor", "disk")


class CountingTransport:
    """A transport that is added: it counts what it sends, and leaves how to another."""

    def __init__(self, inner):
        self.inner, self.opens_session, self.bytes, self.versions = inner, inner.opens_session, 0, []

    def connect(self, servers, ranks):
        self.inner.connect(servers, ranks)

    def begin(self, version):
        self.versions.append(version)
        self.inner.begin(version)

    def allocate(self, num_bytes):
        return self.inner.allocate(num_bytes)

    def send(self, bucket):
        self.bytes += bucket.flat.numel()
        return self.inner.send(bucket)

    def finish(self):
        self.inner.finish()

    def disconnect(self):
        self.inner.disconnect()


@pytest.fixture
def engine_by(tiny_recipe, sglang_servers, reference, tmp_path):
    """An engine whose weights travel by the transport of that name; the shared server is whole again afterwards."""
    engines = []

    def make(transport, **changes):
        values = {"weight_transport": transport, "weight_folder": str(tmp_path / "weights")} | changes
        recipe = tiny_recipe.with_values(
            {f"policy.generation.sglang_cfg.{name}": value for name, value in values.items()}
        )
        engines.append(connect(recipe, sglang_servers.urls))
        return engines[-1]

    yield make
    for engine in engines:
        if not asyncio.run(engine.health()):
            engine.update_weights(reference.named_tensors(), engine.weight_version + 1)
        engine.close()


def check_serves(engine, reference, scale, seed):
    expected = reference.with_weights(reference.named_tensors(scale, seed))
    requests = make_requests(4)
    for request, result in zip(requests, generate(engine, requests), strict=True):
        np.testing.assert_allclose(result.behavior_log_probs, expected.score(request, result)[0], atol=1e-4, rtol=0)
        assert (result.weight_versions == engine.weight_version).all()


def corrupt(engine, monkeypatch, *, updates):
    """The lowest bit of one byte of the third bucket is wrong in so many updates; returns the buckets' names."""
    transport, sent = engine.sync.transport, []
    begin, send = transport.begin, transport.send

    def begin_anew(version):
        sent.clear()
        corrupt.updates += 1
        begin(version)

    def send_wrong(bucket):
        sent.append(bucket.names)
        if len(sent) == 3 and corrupt.updates <= updates:
            bucket.flat[17] ^= 1
        return send(bucket)

    corrupt.updates = 0
    monkeypatch.setattr(transport, "begin", begin_anew)
    monkeypatch.setattr(transport, "send", send_wrong)
    return sent


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_corrupted_bucket_is_caught_before_a_sample_is_drawn(transport, engine_by, reference, monkeypatch):
    """The first time asks for another attempt, which succeeds."""
    engine = engine_by(transport)
    version = engine.weight_version
    sent = corrupt(engine, monkeypatch, updates=1)
    with pytest.raises(WeightsNeeded, match=r"1 of \d+ tensors differ") as caught:
        engine.update_weights(reference.named_tensors(0.1, seed=5), version + 1)
    assert engine.clients[0].url in str(caught.value) and sent[2][0] in str(caught.value)
    assert len(sent) > 3, "the test means one bucket among several"
    with pytest.raises(UserError, match="did not arrive whole"):
        generate(engine, make_requests(2))
    assert engine.weight_version == version

    checksum = engine.update_weights(reference.named_tensors(0.1, seed=5), version + 1)
    total = WeightChecksum()
    for name, tensor in reference.named_tensors(0.1, seed=5):
        total.add(name, tensor)
    assert checksum == total.hexdigest()
    check_serves(engine, reference, 0.1, 5)


def test_a_transport_is_added_by_a_row_of_the_table(engine_by, reference, monkeypatch):
    make = factory.TRANSPORTS["distributed"]
    monkeypatch.setitem(factory.TRANSPORTS, "disk", lambda config, device: CountingTransport(make(config, device)))
    engine = engine_by("disk")
    engine.update_weights(reference.named_tensors(0.1, seed=7), engine.weight_version + 1)
    check_serves(engine, reference, 0.1, 7)
    transport = engine.sync.transport
    assert transport.versions == [engine.weight_version]
    assert transport.bytes >= sum(tensor.nbytes for _, tensor in reference.named_tensors())


def test_a_checksum_that_differs_twice_is_an_error(engine_by, reference, monkeypatch):
    engine = engine_by("distributed")
    corrupt(engine, monkeypatch, updates=2)
    for error in (WeightsNeeded, ChecksumMismatch):
        with pytest.raises(UserError, match="tensors differ") as caught:
            engine.update_weights(reference.named_tensors(), engine.weight_version + 1)
        assert caught.type is error and [fault.url for fault in faults_of(caught.value)] == [engine.clients[0].url]
    assert "as they did the time before" in str(caught.value) and engine.clients[0].url in str(caught.value)


def test_a_server_that_joins_leaves_what_it_has_loaded_out_of_its_collections_once(engine_by, reference, monkeypatch):
    engine, answered = engine_by("distributed"), []
    call = engine.clients[0].call

    def listen(path, *args, **kwargs):
        answer = call(path, *args, **kwargs)
        answered.append(path)
        return answer

    monkeypatch.setattr(engine.clients[0], "call", listen)
    for _ in range(2):
        engine.update_weights(reference.named_tensors(), engine.weight_version + 1)
    assert answered.count("/freeze_gc") == 1, answered


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_only_what_changed_is_sent_and_the_checksum_still_covers_everything(
    transport, engine_by, reference, monkeypatch
):
    engine = engine_by(transport, weight_sync_only_changed=True)
    changed = "model.layers.1.self_attn.q_proj.weight"

    def tensors(value):
        for name, tensor in reference.named_tensors(0.1, seed=8):
            yield name, tensor * value if name == changed else tensor

    engine.update_weights(tensors(1.0), engine.weight_version + 1)
    count = engine.sync.sent["tensors"]
    assert count == len(list(tensors(1.0)))
    engine.update_weights(tensors(1.5), engine.weight_version + 1)
    assert engine.sync.sent["tensors"] == 1
    engine.update_weights(tensors(1.5), engine.weight_version + 1)
    assert engine.sync.sent["tensors"] == 0
    expected = reference.with_weights(tensors(1.5))
    requests = make_requests(2)
    for request, result in zip(requests, generate(engine, requests), strict=True):
        np.testing.assert_allclose(result.behavior_log_probs, expected.score(request, result)[0], atol=1e-4, rtol=0)

    monkeypatch.setattr(
        engine.sync, "_known_checksums", dict.fromkeys(engine.sync._known_checksums, 0) | engine.sync._known_checksums
    )
    wrong = next(key for key in engine.sync._known_checksums if key[0] == changed)
    engine.sync._known_checksums[wrong] = _checksum_of(
        changed, tensors(2.0)
    )  # it believes that the server has this already
    with pytest.raises(WeightsNeeded, match=changed):
        engine.update_weights(tensors(2.0), engine.weight_version + 1)
    engine.update_weights(tensors(2.0), engine.weight_version + 1)
    assert engine.sync.sent["tensors"] == count, "after a failure nothing is taken for granted"


def _checksum_of(name, tensors):
    from vespo_megatron.rollout_sglang.checksum import tensor_checksum

    return tensor_checksum(name, dict(tensors)[name])


def test_disk_keeps_the_last_version_alone(engine_by, reference, tmp_path):
    engine = engine_by("disk")
    for _ in range(2):
        engine.update_weights(reference.named_tensors(), engine.weight_version + 1)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [f"v{engine.weight_version}"]


def test_released_memory_comes_back_with_the_next_weights(engine_by, reference):
    """On a CPU SGLang frees nothing; the calls and their order are the same."""
    engine = engine_by("tensor", colocated=True, weight_sync_only_changed=True)
    engine.update_weights(reference.named_tensors(), engine.weight_version + 1)
    engine.release_memory()
    with pytest.raises(UserError, match="memory is released"):
        generate(engine, make_requests(1))
    engine.update_weights(reference.named_tensors(0.1, seed=6), engine.weight_version + 1)
    assert engine.sync.sent["tensors"] == len(engine.sync._served), "released weights are lost"
    with pytest.raises(UserError, match="cache is released"):
        generate(engine, make_requests(1))
    engine.resume_memory()
    check_serves(engine, reference, 0.1, 6)
