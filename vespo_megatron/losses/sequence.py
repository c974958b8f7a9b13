"""Packed sequences, and sums over them that one all-reduce completes on every context parallel rank.

Tensors are packed: the sequences' tokens one after another, `[tokens]`, with offsets `cu_seqlens [num_sequences + 1]`.
With context parallelism the offsets are into this rank's own pieces; a rank may hold no token of a sequence.
Nothing here is differentiable: coefficients are detached, so no collective needs a backward.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.lazy import lazy
from vespo_megatron.losses.one_line import OneLine

_NUMPY_DTYPES = (torch.float32, torch.float64)


@cache
def numpy_or_none() -> Any:
    """NumPy where it is installed: PyTorch does without it, and so does this package."""
    try:
        import numpy
    except ImportError:
        return None
    return numpy


@cache
def has_triton(device_type: str) -> bool:
    """Whether Triton's kernels can run on such a device."""
    return device_type == "cuda" and find_spec("triton") is not None


@dataclass(frozen=True, repr=False)
class PackedSequences(OneLine):
    """Where each sequence's tokens are on this rank.

    Raises:
        UserError: offsets that do not start at 0, fall, or do not end at `num_tokens` (checked where `cu_seqlens` is
            in host memory; checking it on a device would make the host wait).
    """

    cu_seqlens: Tensor
    """Integer [num_sequences + 1], on the host or on the tokens' device."""
    num_tokens: int
    """Tokens on this rank."""
    device: torch.device
    """Where the tokens are."""
    group: dist.ProcessGroup | None = None
    """Context parallel group; None: every sequence is whole on this rank."""

    def __post_init__(self) -> None:
        if self.cu_seqlens.dim() != 1 or len(self.cu_seqlens) == 0:
            raise UserError(
                f"has shape {tuple(self.cu_seqlens.shape)}", where="cu_seqlens", expected="[num_sequences + 1]"
            )
        if self.cu_seqlens.is_cpu and not torch.compiler.is_compiling():
            ends = int(self.cu_seqlens[0]), int(self.cu_seqlens[-1])
            if ends != (0, self.num_tokens) or (self.cu_seqlens.diff() < 0).any():
                offsets = self.cu_seqlens.tolist()
                shown = offsets if len(offsets) <= 9 else [*offsets[:4], "…", *offsets[-4:]]
                raise UserError(
                    f"{shown} are no offsets of {self.num_tokens} packed tokens",
                    where="cu_seqlens",
                    expected=f"offsets that start at 0, never fall and end at {self.num_tokens}",
                )

    @property
    def on_host(self) -> bool:
        """Whether tokens and offsets are both in host memory, where a loop over sequences costs no wait.

        Not under `torch.compile`: what it traces must not depend on values.
        """
        return self.device.type == "cpu" and self.cu_seqlens.is_cpu and not torch.compiler.is_compiling()

    @property
    def uses_triton(self) -> bool:
        """Whether the tokens are on a GPU with Triton and the offsets in host memory, as `triton_sums` needs them."""
        return self.cu_seqlens.is_cpu and not torch.compiler.is_compiling() and has_triton(self.device.type)

    @lazy
    def longest(self) -> int:
        """Tokens of the longest sequence on this rank; for offsets in host memory."""
        return int(self.cu_seqlens.diff().max()) if self.num_sequences else 0

    @property
    def num_sequences(self) -> int:
        """Sequences of the micro-batch, those with no token here included."""
        return len(self.cu_seqlens) - 1

    @lazy
    def offsets(self) -> Tensor:
        """int64 [num_sequences + 1] on the tokens' device."""
        return self.cu_seqlens.to(self.device, torch.int64, non_blocking=True)

    @lazy
    def local_lengths(self) -> Tensor:
        """int64 [num_sequences]: tokens on this rank, masked ones included."""
        return self.offsets.diff()

    @lazy
    def _host_lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()

    @lazy
    def _host_starts(self) -> tuple[Any, Any]:
        """NumPy arrays: sequences with a token here, and their offsets (each ends where the next begins)."""
        offsets = self.cu_seqlens.numpy()
        numbers = numpy_or_none().flatnonzero(offsets[1:] > offsets[:-1])
        return numbers, offsets[numbers]

    def in_block(self, block: slice) -> tuple[Any, Any]:
        """NumPy arrays of the sequences with tokens in this block of tokens, and of where in it each one begins."""
        numbers, starts = self._host_starts
        numpy = numpy_or_none()
        some = slice(
            numpy.searchsorted(starts, block.start, "right") - 1, numpy.searchsorted(starts, block.stop, "left")
        )
        return numbers[some], numpy.maximum(starts[some] - block.start, 0)

    @lazy
    def segment_ids(self) -> Tensor:
        """int64 [tokens]: the sequence each token belongs to."""
        numbers = torch.arange(self.num_sequences, device=self.device)
        return torch.repeat_interleave(numbers, self.local_lengths, output_size=self.num_tokens)

    def local_sum(self, values: Tensor) -> Tensor:
        """Sum of `values [tokens]` over each sequence's tokens on this rank: [num_sequences], same type.

        One pass over the tokens. Not by PyTorch's segment_reduce on the host: it adds one token after another there,
        which loses three digits of a float32 sum of 10⁵ tokens. NumPy's reduceat sums in float64; where there is no
        NumPy, or no such type in it, each piece is summed on its own.
        """
        if self.on_host and numpy_or_none() is not None and values.dtype in _NUMPY_DTYPES:
            out = values.new_zeros(self.num_sequences)
            numbers, starts = self._host_starts
            if len(numbers):
                with numpy_or_none().errstate(
                    invalid="ignore", over="ignore"
                ):  # what is not finite is found in the sums
                    out.numpy()[numbers] = numpy_or_none().add.reduceat(
                        values.detach().numpy(), starts, dtype="float64"
                    )
            return out
        if self.on_host:
            out = values.new_empty(self.num_sequences)
            for index, piece in enumerate(values.split(self._host_lengths)):
                torch.sum(piece, 0, out=out[index])
            return out
        return torch.segment_reduce(values, "sum", offsets=self.offsets, initial=0.0)

    def expand(self, values: Tensor) -> Tensor:
        """Give every token its sequence's value: [num_sequences] → [tokens], detached."""
        values = values.detach()
        if self.on_host and numpy_or_none() is not None and values.dtype in _NUMPY_DTYPES:
            return torch.from_numpy(numpy_or_none().repeat(values.numpy(), self.cu_seqlens.diff().numpy()))
        if self.on_host:
            out = values.new_empty(self.num_tokens)
            for piece, value in zip(out.split(self._host_lengths), values.tolist(), strict=True):
                piece.fill_(value)
            return out
        return torch.repeat_interleave(values, self.local_lengths, output_size=self.num_tokens)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum `values` (any shape) over the context parallel group, in place; without a group, nothing."""
        if self.group is not None:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group)
        return values

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank reports what every context parallel rank knows (per-sequence metrics)."""
        return self.group is None or dist.get_rank(self.group) == 0


@dataclass(frozen=True)
class SequenceSums:
    """Sums over each sequence's unmasked tokens, every tensor [num_sequences] of one type; None: not asked for."""

    length: Tensor
    """The number of unmasked tokens."""
    log_w: Tensor
    """Σ (log π_θ − log μ), uncorrected."""
    log_ratio: Tensor
    """Σ of the log-ratio against the anchor, with a correction before the clip in it and without what it drops."""
    clamped_log_ratio: Tensor
    """The same with every token's log-ratio clamped."""
    mismatch: Tensor | None = None
    """Σ (log π_old − log μ)."""
    kept: Tensor | None = None
    """The number of tokens that a correction keeps."""
    weight: Tensor | None = None
    """Σ of a correction's token weights."""
    advantage: Tensor | None = None
    """Σ of an advantage per token."""
    others: Tensor | None = None
    """Σ of whatever else has to be finite."""
    judged: tuple[Tensor, ...] = ()
    """What the rules judge that reject whole sequences, each summed."""

    def over_context_parallel(self, sequences: PackedSequences) -> SequenceSums:
        """The sums over whole responses, from those over this rank's tokens: the one collective of the loss."""
        if sequences.group is None:
            return self
        names = [f.name for f in fields(self) if f.name != "judged" and getattr(self, f.name) is not None]
        rows = [getattr(self, name) for name in names]
        summed = sequences.all_reduce(torch.stack([*rows, *self.judged])).unbind()
        return SequenceSums(**dict(zip(names, summed, strict=False)), judged=summed[len(names) :])
