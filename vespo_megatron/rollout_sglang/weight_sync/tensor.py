"""Transport `tensor`: memory shared with servers on this machine, which copy the trainer's buckets from it.

On the host a bucket is a file of `/dev/shm` that torch's `file_system` sharing strategy makes (the default strategy
passes a file descriptor over a socket that belongs to a process tree; an independent server dies of it). On a GPU it
is CUDA memory shared by its IPC handle (run between two processes on an H100, without a server).

SGLang's `/update_weights_from_tensor` takes a pickle of where the memory is, base64 in JSON, one per tensor parallel
rank: every rank unpickles only its own, because each CUDA handle is counted. A server that unpickles what HTTP brings
runs what it is told to, but for an allow-list. So this transport is only for servers that this run started itself and
that listen on loopback, and it sends nothing but the names and places of tensors, built from types of that list.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import torch
from torch.multiprocessing import reductions

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.faults import ServerFault
from vespo_megatron.rollout_sglang.weight_sync.buckets import Bucket, Wait
from vespo_megatron.rollout_sglang.weight_sync.servers import Servers
from vespo_megatron.rollout_sglang.weight_sync.transport import check_shared
from vespo_megatron.run.network import is_loopback

_SHARED_MEMORY = "/dev/shm"
_FIX = "set policy.generation.sglang_cfg.weight_transport=distributed"


class TensorTransport:
    """See `transport.Transport`.

    Args:
        device: where buckets live: "cpu" is shared memory, "cuda" CUDA IPC.
    """

    opens_session = True

    def __init__(self, device: str) -> None:
        self.device = device

    def connect(self, servers: Servers, ranks: Sequence[int]) -> None:
        """Refuses a server that is not on loopback, or does not see this process's shared memory."""
        for client in servers.clients:
            if not is_loopback(urlsplit(client.url).hostname or ""):
                raise ServerFault(
                    "is not on loopback, and weight_transport tensor sends a server what it unpickles",
                    url=client.url,
                    fix=_FIX,
                )
        if self.device == "cpu":
            check_shared(servers, _SHARED_MEMORY, fix=_FIX)
        self._servers, self._ranks = servers, list(ranks)

    def begin(self, version: int) -> None:
        """Nothing to prepare."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Shared memory; freed with the last mapping of it, the trainer's or a server's."""
        if self.device != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        stats = os.statvfs(_SHARED_MEMORY)
        free = stats.f_bavail * stats.f_frsize
        if num_bytes > free:  # a write beyond it would end this process with SIGBUS
            raise UserError(
                f"{free >> 20} MiB are free, a bucket needs {(num_bytes >> 20) + 1}",
                where=_SHARED_MEMORY,
                fix="give the container more (--shm-size), or lower policy.generation.sglang_cfg.weight_bucket_bytes",
            )
        return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_using_filename_cpu(num_bytes))

    def send(self, bucket: Bucket) -> Wait:
        """One post per server; it is answered when every rank has copied the bucket into its weights."""
        if bucket.flat.is_cuda:
            torch.cuda.current_stream().synchronize()  # the server's stream knows nothing of ours
        metadata, start = [], 0
        for name, dtype_name, sizes in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
            dtype, shape = getattr(torch, dtype_name), torch.Size(sizes)
            end = start + shape.numel() * dtype.itemsize
            # The fields of SGLang's FlattenedTensorMetadata, which this process has not.
            each = {"name": name, "shape": shape, "dtype": dtype, "start_idx": start, "end_idx": end}
            metadata.append(SimpleNamespace(**each, numel=end - start))
            start = end
        value = {"flattened_tensor": bucket.flat, "metadata": metadata}
        posts = []
        for client, ranks in zip(self._servers.clients, self._ranks, strict=True):
            body = {
                "serialized_named_tensors": [serialize(value) for _ in range(ranks)],
                "load_format": "flattened_bucket",
                "selector": "target",
                "flush_cache": False,
            }
            posts.append(self._servers.post(client, "/update_weights_from_tensor", body))
        return lambda: self._servers.wait(posts)

    def finish(self) -> None:
        """Every bucket is loaded when its post is answered."""

    def disconnect(self) -> None:
        """Nothing stays open: buffers belong to the sender and go with it."""


def serialize(value: Any) -> str:
    """base64 of a pickle in which a tensor is the place of its memory; see `_Pickler`."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return base64.b64encode(buffer.getvalue()).decode()


class _Pickler(ForkingPickler):
    """As torch's own, but for host storages by file name without making that the whole process's strategy."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return _reduce_cuda(value)
        if isinstance(value, torch.UntypedStorage):
            place = value._share_filename_cpu_()
            value._shared_incref()  # the reader takes this count over; without it, its end would unlink the file
            return reductions.rebuild_storage_filename, (torch.UntypedStorage, *place)
        return NotImplemented


def _reduce_cuda(tensor: torch.Tensor) -> Any:
    """torch's, with the device by its UUID: the server may number the GPUs otherwise.

    SGLang replaces `rebuild_cuda_tensor` by one that takes a UUID (sglang/srt/utils/patch_torch.py).
    """
    rebuild, arguments = reductions.reduce_tensor(tensor)
    uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
    return rebuild, (*arguments[:6], uuid, *arguments[7:])
