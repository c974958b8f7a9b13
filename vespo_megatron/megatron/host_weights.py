"""One rank's weights in host memory, bit by bit: copied from the model, and back into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vespo_megatron.megatron import hf_weights

_PIECE = 256 << 20
"""Bytes of one allocation. PyTorch rounds pinned ones up to a power of two: few of this size waste little, where one
for all weights could waste as much again."""
_ALIGNMENT = 16


@dataclass(frozen=True)
class _Part:
    """A run of bytes that is in one piece."""

    piece: int
    at: int
    begin: int
    """In its tensor."""
    size: int


class HostWeights:
    """A copy of tensors in host memory, pinned where they are on a GPU.

    Args:
        like: the tensors that will be copied, in this order ever after.
    """

    def __init__(self, like: Sequence[torch.Tensor]) -> None:
        self._parts: list[list[_Part]] = []
        end = 0
        for tensor in like:
            end = -(-end // _ALIGNMENT) * _ALIGNMENT
            self._parts.append(list(_cut(end, tensor.nbytes)))
            end += tensor.nbytes
        pinned = any(tensor.device.type == "cuda" for tensor in like)
        sizes = [min(_PIECE, end - start) for start in range(0, end, _PIECE)]
        self._pieces = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(piece.nbytes for piece in self._pieces)

    def copy_from(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take the tensors' values. Returns when they are here."""
        for here, there in self._pairs(tensors):
            here.copy_(there)

    def copy_to(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give the tensors the values that were taken, in place."""
        for here, there in self._pairs(tensors):
            there.copy_(here)

    def _pairs(self, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(bytes here, the same bytes of a tensor)."""
        for tensor, parts in zip(tensors, self._parts, strict=True):
            flat = tensor.detach().view(-1).view(torch.uint8)  # refuses a tensor that does not lie in one row
            if flat.nbytes != sum(part.size for part in parts):
                raise ValueError(f"a tensor of {flat.nbytes} bytes where {sum(part.size for part in parts)} were kept")
            for part in parts:
                yield self._pieces[part.piece][part.at : part.at + part.size], flat[part.begin : part.begin + part.size]


def _cut(start: int, size: int) -> Iterator[_Part]:
    """`size` bytes from `start` of all pieces one after another."""
    begin = 0
    while begin < size:
        piece, at = divmod(start + begin, _PIECE)
        here = min(size - begin, _PIECE - at)
        yield _Part(piece, at, begin, here)
        begin += here


def weights_of(chunks: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
    """What a forward on this rank depends on and training changes: parameters, and buffers that checkpoints hold.

    The latter are, of a router, the bias that balances its experts.
    """
    return [tensor.detach() for chunk in chunks for _, tensor in hf_weights.named_weights(hf_weights.unwrap(chunk))]
