"""Ranks that share one card, over gloo: NCCL takes no two processes on one GPU.

gloo takes CUDA tensors in every collective but sends and receives, which go by the host here.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import layout_work
import policy_work
import torch
import torch.distributed as dist

CARD = torch.device("cuda", 0)


def everything(folder: str, layout: dict[str, Any], store: str) -> dict[str, Any]:
    """`layout_work.everything` of one of several ranks on the card."""
    import os

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(CARD)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    real = dist.isend, dist.irecv
    dist.isend, dist.irecv = _send_by_host(dist.isend), _receive_by_host(dist.irecv)
    try:
        return policy_work.on_host(layout_work.everything(folder, layout, store, device=CARD))
    finally:
        dist.isend, dist.irecv = real


class _Sent:
    """A send of a copy on the host, which lives until it has gone."""

    def __init__(self, work: Any, copy: torch.Tensor) -> None:
        self._work, self._copy = work, copy

    def wait(self) -> None:
        self._work.wait()


class _Received:
    """A receive into the host, which is copied to the card by whoever waits for it."""

    def __init__(self, work: Any, copy: torch.Tensor, target: torch.Tensor) -> None:
        self._work, self._copy, self._target = work, copy, target

    def wait(self) -> None:
        self._work.wait()
        self._target.detach().copy_(self._copy)


def _send_by_host(send: Any) -> Any:
    def wrapper(tensor: torch.Tensor, dst: int, group: Any = None) -> _Sent:
        copy = tensor.detach().cpu()
        return _Sent(send(copy, dst, group), copy)

    return wrapper


def _receive_by_host(receive: Any) -> Any:
    def wrapper(tensor: torch.Tensor, src: int, group: Any = None) -> _Received:
        copy = torch.empty_like(tensor, device="cpu")
        return _Received(receive(copy, src, group), copy, tensor)

    return wrapper
