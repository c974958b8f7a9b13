"""Flat buffers of tensors: one is filled while the other is on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Wait = Callable[[], None]


@dataclass
class Bucket:
    """Some tensors one after another, as SGLang's `flattened_bucket` has them."""

    flat: torch.Tensor
    """uint8 [bytes]"""
    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)


class BucketSender:
    """Copies tensors into one of two flat buffers and sends each as it fills.

    A tensor that would start at an offset its dtype is not aligned to begins the next bucket (SGLang refuses it), and
    one larger than a bucket gets a buffer of its own, kept for its next time.

    Args:
        send: starts a bucket on its way and returns what waits for it; its buffer is not touched until then.
        allocate: a uint8 buffer of so many bytes, where the transport wants it.
        capacity: bytes of each of the two buffers.
    """

    def __init__(self, send: Callable[[Bucket], Wait], allocate: Callable[[int], torch.Tensor], capacity: int) -> None:
        self._send, self._allocate, self._capacity = send, allocate, capacity
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._current = 0
        self._bucket: Bucket | None = None
        self._offset = 0
        self._wait: Wait | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Copy one tensor in; may wait until the bucket before the last one has arrived."""
        if self._bucket and (
            self._offset + tensor.nbytes > self._bucket.flat.numel() or self._offset % tensor.element_size() != 0
        ):
            self._flush()
        bucket = self._bucket = self._bucket or Bucket(self._buffer(tensor.nbytes))
        end = self._offset + tensor.nbytes
        bucket.flat[self._offset : end].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
        bucket.names.append(name)
        bucket.dtypes.append(str(tensor.dtype).removeprefix("torch."))
        bucket.shapes.append(list(tensor.shape))
        self._offset = end

    def finish(self) -> None:
        """Send what is left and wait for all of it."""
        if self._bucket:
            self._flush()
        self._wait_for_previous()

    def _buffer(self, nbytes: int) -> torch.Tensor:
        buffer = self._buffers[self._current]
        if buffer is None or buffer.numel() < nbytes:
            self._buffers[self._current] = buffer = None  # before the new one, so that the two never exist together
            buffer = self._buffers[self._current] = self._allocate(max(nbytes, self._capacity))
        return buffer

    def _flush(self) -> None:
        bucket, self._bucket = self._bucket, None
        assert bucket is not None
        self._wait_for_previous()
        bucket.flat, self._offset = bucket.flat[: self._offset], 0
        self._wait = self._send(bucket)
        self._current = 1 - self._current

    def _wait_for_previous(self) -> None:
        wait, self._wait = self._wait, None
        if wait is not None:
            wait()
