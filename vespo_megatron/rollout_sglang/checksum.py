"""One checksum of a set of named weights, the same whatever order, bucket or process they are hashed in.

Trainer and rollout engine each sum `tensor_checksum` over what they hold; equal digests mean equal weights.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MODULUS = 1 << 64


def tensor_checksum(name: str, tensor: torch.Tensor) -> int:
    """A 64-bit xxh3 of the name, dtype, shape and raw bytes of one tensor (any device, any strides)."""
    import torch
    import xxhash

    host = tensor.detach().cpu().contiguous()
    digest = xxhash.xxh3_64(f"{name} {str(host.dtype).removeprefix('torch.')} {tuple(host.shape)}".encode())
    flat = host.reshape(-1).view(torch.uint8)
    # Not through NumPy, after whose look at a storage PyTorch resizes it no more, as a policy does that is parked.
    digest.update((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()) if flat.nbytes else b"")
    return digest.intdigest()


class WeightChecksum:
    """Sums tensor checksums modulo 2**64, so that order and grouping do not matter."""

    def __init__(self) -> None:
        self._total = 0
        self._count = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor in."""
        self.add_checksum(tensor_checksum(name, tensor))

    def add_checksum(self, checksum: int, count: int = 1) -> None:
        """Take in the sum of `count` tensor checksums computed elsewhere, for instance by another rank."""
        self._total = (self._total + checksum) % _MODULUS
        self._count += count

    @property
    def total(self) -> int:
        """The sum so far, below 2**64."""
        return self._total

    def hexdigest(self) -> str:
        """`<tensors>-<16 hexadecimal digits>`"""
        return f"{self._count}-{self._total:016x}"
