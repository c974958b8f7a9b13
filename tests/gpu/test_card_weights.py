"""Weights on their way from the card: shared with another process by CUDA IPC, broadcast by NCCL, kept on the host."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vespo_megatron.megatron.host_weights import HostWeights
from vespo_megatron.rollout_sglang.weight_sync.broadcast_group import BroadcastGroup
from vespo_megatron.rollout_sglang.weight_sync.buckets import BucketSender
from vespo_megatron.rollout_sglang.weight_sync.tensor import TensorTransport

READER = """
import base64, pickle, sys
import torch
from torch.multiprocessing import reductions

original = reductions.rebuild_cuda_tensor
def rebuild(*arguments):  # as SGLang does: the device is known by its UUID
    (index,) = [number for number in range(torch.cuda.device_count())
                if str(torch.cuda.get_device_properties(number).uuid) == arguments[6]]
    return original(*arguments[:6], index, *arguments[7:])
reductions.rebuild_cuda_tensor = rebuild
for line in sys.stdin:
    value = pickle.loads(base64.b64decode(line))
    flat = value["flattened_tensor"].clone()
    for each in value["metadata"]:
        part = flat[each.start_idx:each.end_idx].view(each.dtype).reshape(each.shape)
        print(each.name, part.double().sum().item(), part.double().square().sum().item(), flush=True)
    print("done", flush=True)
"""


class Reader:
    """A server's part of transport `tensor`, in a process of its own."""

    url = "http://127.0.0.1:1"

    def __init__(self):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.found = {}

    def take(self, body):
        for pickled in body["serialized_named_tensors"]:
            self.process.stdin.write(pickled + "\n")
            self.process.stdin.flush()
            while (line := self.process.stdout.readline().strip()) != "done":
                assert line, self.process.stderr.read()[-1500:]
                name, *sums = line.split()
                self.found[name] = [float(each) for each in sums]


def weights(device, generator):
    shapes = {"embedding": (1000, 64), "one": (1,), "norm": (64,), "experts": (8, 96, 64)}
    named = {name: torch.randn(*shape, device=device, generator=generator) for name, shape in shapes.items()}
    return {name: tensor.to(torch.bfloat16) if name != "norm" else tensor for name, tensor in named.items()}


@pytest.mark.cuda
def test_another_process_reads_buckets_from_the_card(device, generator):
    reader = Reader()
    servers = SimpleNamespace(
        clients=[reader], post=lambda client, path, body: client.take(body), wait=lambda posts: None
    )
    transport = TensorTransport("cuda")
    try:
        transport.connect(servers, [2])
        sender = BucketSender(transport.send, transport.allocate, 40_000)
        named = weights(device, generator)
        for name, tensor in named.items():
            sender.add(name, tensor)
        sender.finish()
    finally:
        reader.process.stdin.close()
        reader.process.wait(30)
    for name, tensor in named.items():
        wanted = [tensor.double().sum().item(), tensor.double().square().sum().item()]
        assert reader.found[name] == pytest.approx(wanted, rel=1e-12)


def test_a_group_broadcasts_where_it_is_alone(device):
    """Of one rank: the communicator, its options and its store are real; there is one card to try them on."""
    group = BroadcastGroup.join(
        name="alone",
        backend="nccl" if device.type == "cuda" else "gloo",
        master_address="127.0.0.1",
        world_size=1,
        timeout_s=60.0,
        invite=lambda port: None,
        failed=lambda: None,
    )
    try:
        for _ in range(2):
            tensor = torch.arange(1000, device=device, dtype=torch.uint8)
            group.broadcast(tensor, lambda: None).wait()
            assert torch.equal(tensor.cpu(), torch.arange(1000, dtype=torch.uint8))
    finally:
        group.close()


def test_weights_kept_on_the_host_come_back_bit_by_bit(device, generator):
    tensors = list(weights(device, generator).values())
    wanted = [tensor.clone() for tensor in tensors]
    kept = HostWeights(tensors)
    kept.copy_from(tensors)
    for tensor in tensors:
        tensor.fill_(7)
    kept.copy_to(tensors)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, wanted, strict=True))
    assert kept._pieces[0].is_pinned() == (device.type == "cuda")
