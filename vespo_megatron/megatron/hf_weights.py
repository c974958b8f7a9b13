"""Hugging Face weights both ways, streamed: safetensors → this rank's shards, live shards of any layout → HF tensors.

Loading: each rank reads the slices it needs from disk. Exporting: all ranks agree once on which rank holds which
shard of which parameter; then, bucket by bucket, the holders send their shards to global rank 0, which joins them
and yields HF-named tensors. One bucket and one tensor joined from it exist beside the model, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from vespo_megatron.errors import UserError
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.megatron.hf_folder import FolderWriter
from vespo_megatron.megatron.hf_mapping import expected_tensors, is_further, rule_for
from vespo_megatron.megatron.model import PolicyModel
from vespo_megatron.megatron.parallel import RankInfo
from vespo_megatron.megatron.parameter_gather import finish_parameter_gather
from vespo_megatron.megatron.shard_rules import Rule
from vespo_megatron.recipe.weight_files import check_safetensors, weight_files

NamedTensor = tuple[str, torch.Tensor]
Read = Callable[[torch.Tensor], torch.Tensor]
"""What is exported of a parameter."""


# ---- reading a folder --------------------------------------------------------------------------------------------


class SafetensorsFolder:
    """The tensors of a HF folder, one file or many, read lazily.

    Raises:
        UserError: no weights, a truncated or damaged file, a missing, extra or misshapen tensor.
    """

    def __init__(self, folder: str | Path, shape: ModelShape) -> None:
        self.folder = Path(folder)
        self._files: dict[str, safe_open] = {}
        self._file_of: dict[str, str] = {}
        for path in weight_files(self.folder):
            check_safetensors(path)
            name = path.name
            try:
                file = self._files[name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise UserError(
                    f"is damaged or truncated ({error})",
                    where=str(path),
                    expected="a whole safetensors file",
                    fix="copy it again",
                ) from None
            self._file_of |= dict.fromkeys(file.keys(), name)
        self._check(shape)

    def _check(self, shape: ModelShape) -> None:
        expected = expected_tensors(shape)
        found = set(self._file_of)
        if shape.tie_word_embeddings:
            found.discard("lm_head.weight")  # some writers keep the tied copy
        if missing := [name for name in expected if name not in found]:
            raise UserError(
                f"lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
                where=str(self.folder),
                expected="every tensor that config.json implies",
            )
        if extra := sorted(name for name in found - set(expected) if not is_further(name, shape)):
            raise UserError(
                f"has {extra[0]}" + (f" and {len(extra) - 1} more" if len(extra) > 1 else "") + ", which has no place",
                where=str(self.folder),
                expected="only the tensors that config.json implies",
            )
        for name, wanted in expected.items():
            actual = tuple(self._files[self._file_of[name]].get_slice(name).get_shape())
            if actual != wanted:
                raise UserError(
                    f"{name} has shape {list(actual)}",
                    where=str(self.folder),
                    expected=f"{list(wanted)}, from config.json",
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[self._file_of[name]].get_tensor(name)


# ---- live parameters ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of this rank, or a buffer that checkpoints hold: which shard, of which HF tensors."""

    rule: Rule
    parameter: torch.Tensor
    shard: int
    num_shards: int
    is_buffer: bool = False
    """Nothing that gradients move: a router's correction bias."""

    @property
    def key(self) -> str:
        """Global identity, the same on every rank that holds a shard of it."""
        return "+".join(self.rule.names)


def unwrap(chunk: torch.nn.Module) -> PolicyModel:
    """The model inside DDP and Float16Module."""
    while not isinstance(chunk, PolicyModel):
        chunk = chunk.get_submodule("module")
    return chunk


def local_parameters(chunks: Sequence[torch.nn.Module], shape: ModelShape, rank_info: RankInfo) -> list[LocalParameter]:
    """Every weight of this rank's chunks with its rule; layers are known by their own number, not their order."""
    num_local_experts = shape.num_experts // rank_info.expert_size
    first_expert = rank_info.expert_rank * num_local_experts
    result = []
    for chunk in map(unwrap, chunks):
        layer_of = {index: layer.layer_number - 1 for index, layer in enumerate(chunk.decoder.layers)}
        for name, parameter in named_weights(chunk):
            layer = layer_of[int(name.split(".")[2])] if name.startswith("decoder.layers.") else None
            rule = rule_for(name, shape, layer=layer, first_expert=first_expert, num_local_experts=num_local_experts)
            rank, size = (
                (rank_info.expert_tensor_rank, rank_info.expert_tensor_size)
                if rule.is_expert
                else (rank_info.tensor_rank, rank_info.tensor_size)
            )
            result.append(
                LocalParameter(
                    rule,
                    parameter,
                    shard=rank if rule.is_sharded else 0,
                    num_shards=size if rule.is_sharded else 1,
                    is_buffer=not isinstance(parameter, torch.nn.Parameter),
                )
            )
    return result


def named_weights(model: PolicyModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and buffers that checkpoints hold: what a forward depends on and training changes."""
    yield from model.named_parameters()
    saved = model.state_dict()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


@torch.no_grad()
def load(chunks: Sequence[torch.nn.Module], folder: str | Path, shape: ModelShape, rank_info: RankInfo) -> None:
    """Fill every parameter of this rank from a HF folder, one tensor at a time.

    Raises:
        UserError: as `SafetensorsFolder`; a weight that is beyond the numbers of the model's dtype.
    """
    files = SafetensorsFolder(folder, shape)
    for local in local_parameters(chunks, shape, rank_info):
        tensors = [files[name] for name in local.rule.names]
        shard, parameter = local.rule.shard(tensors, local.shard, local.num_shards), local.parameter
        parameter.copy_(shard)
        if parameter.dtype is torch.float16 and bool((parameter.isinf() & shard.to(parameter.device).isfinite()).any()):
            raise UserError(
                f"{local.rule.names[0]} reaches {shard.abs().max():.6g}; the largest number of float16 is 65504",
                where=str(folder),
                expected="policy.precision=bfloat16 or float32 for such weights",
            )


# ---- exporting ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One parameter of the whole model: its rule, what a shard is like, and the rank that sends each shard."""

    rule: Rule
    shard_shape: torch.Size
    dtype: torch.dtype
    is_buffer: bool
    senders: tuple[int, ...]

    def travels_with(self, other: _Entry) -> bool:
        """Whether both can be sent as one row of numbers."""
        return (self.dtype, self.is_buffer, self.senders) == (other.dtype, other.is_buffer, other.senders)

    @property
    def numel(self) -> int:
        return self.shard_shape.numel()


class WeightExporter:
    """Streams the live weights as HF-named tensors to global rank 0. Build and use it on every rank alike."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        shape: ModelShape,
        rank_info: RankInfo,
        *,
        bucket_bytes: int = 256 << 20,
    ) -> None:
        self.rank_info, self.bucket_bytes = rank_info, bucket_bytes
        self._position = {name: position for position, name in enumerate(expected_tensors(shape))}
        self._local = {local.key: local for local in local_parameters(chunks, shape, rank_info)}
        self._chunks = chunks

    @cached_property
    def _buckets(self) -> list[list[tuple[str, _Entry]]]:
        """Parameters in checkpoint order, cut where the senders change or a bucket is full; agreed on by all."""
        mine = [
            (key, local.shard, (local.rule, local.parameter.shape, local.parameter.dtype, local.is_buffer))
            for key, local in self._local.items()
        ]
        everyone: list = [None] * self.rank_info.world_size
        dist.all_gather_object(everyone, mine)
        senders: dict[str, dict[int, int]] = {}
        known: dict[str, tuple[Rule, torch.Size, torch.dtype, bool]] = {}
        for rank, held in enumerate(everyone):
            for key, shard, described in held:
                senders.setdefault(key, {}).setdefault(shard, rank)  # the lowest rank that holds it
                known[key] = described
        buckets: list[list[tuple[str, _Entry]]] = []
        filled = 0
        for key in sorted(known, key=lambda key: self._position[known[key][0].names[0]]):
            entry = _Entry(*known[key], tuple(senders[key][shard] for shard in range(len(senders[key]))))
            num_bytes = 4 * entry.numel * len(entry.senders)
            if buckets and entry.travels_with(buckets[-1][-1][1]) and filled + num_bytes <= self.bucket_bytes:
                buckets[-1].append((key, entry))
                filled += num_bytes
            else:
                buckets.append([(key, entry)])
                filled = num_bytes
        return buckets

    @torch.no_grad()
    def stream(self, read: Read | None = None) -> Iterator[NamedTensor]:
        """Yields (HF name, tensor) in checkpoint order on rank 0 and nothing elsewhere; exhaust it on every rank.

        `read` says what is exported of a parameter: the weight (default), or for instance its gradient, which buffers
        have none of.
        """
        finish_parameter_gather(self._chunks)
        for bucket in self._buckets:
            entry = bucket[0][1]
            if read is None or not entry.is_buffer:
                yield from self._whole(bucket, read or torch.Tensor.detach, entry.dtype if read is None else None)

    def _whole(self, bucket: list[tuple[str, _Entry]], read: Read, dtype: torch.dtype | None) -> Iterator[NamedTensor]:
        """The tensors of one bucket on rank 0, nothing elsewhere. `dtype`: what `read` gives; None: as of any other."""
        senders = bucket[0][1].senders
        if senders == (0,):  # nothing to gather
            if self.rank_info.rank == 0:
                for key, entry in bucket:
                    yield from self._join([(key, entry)], [read(self._local[key].parameter).reshape(-1)])
        elif self.rank_info.rank == 0:
            dtype = dtype or read(next(each.parameter for each in self._local.values() if not each.is_buffer)).dtype
            shards = [self._own(bucket, read) if rank == 0 else self._receive(bucket, rank, dtype) for rank in senders]
            yield from self._join(bucket, shards)
        elif self.rank_info.rank in senders:
            dist.send(self._own(bucket, read), dst=0)

    def _own(self, bucket: list[tuple[str, _Entry]], read: Read) -> torch.Tensor:
        """The shards of this rank, one after another: flat."""
        return torch.cat([read(self._local[key].parameter).reshape(-1) for key, _ in bucket])

    def _receive(self, bucket: list[tuple[str, _Entry]], rank: int, dtype: torch.dtype) -> torch.Tensor:
        """The shards `rank` sends, one after another: flat."""
        buffer = torch.empty(sum(entry.numel for _, entry in bucket), dtype=dtype, device=self.rank_info.device)
        dist.recv(buffer, src=rank)
        return buffer

    @staticmethod
    def _join(bucket: list[tuple[str, _Entry]], shards: list[torch.Tensor]) -> Iterator[NamedTensor]:
        offset = 0
        for _, entry in bucket:
            pieces = [shard[offset : offset + entry.numel].view(entry.shard_shape) for shard in shards]
            yield from zip(entry.rule.names, entry.rule.merge(pieces), strict=True)
            offset += entry.numel


def save(
    exporter: WeightExporter, folder: str | Path, *, copy_from: str | Path | None = None, shard_bytes: int = 4 << 30
) -> None:
    """Write the live weights as a HF folder (a collective; rank 0 writes): all of it is on the disk, or nothing.

    Args:
        folder: one of an earlier attempt is replaced.
        copy_from: the folder whose configuration and tokenizer files belong beside the weights.
        shard_bytes: size at which the next safetensors file begins.

    Raises:
        UserError: on every rank, when it cannot be written.
    """
    writer, failure = FolderWriter(Path(folder), Path(copy_from) if copy_from else None, shard_bytes), ""
    is_first = exporter.rank_info.rank == 0

    def attempt(action: Callable[..., None], *arguments: Any) -> None:
        nonlocal failure
        try:
            if not failure:
                action(*arguments)
        except (OSError, SafetensorError) as error:
            failure = str(error)

    if is_first:
        attempt(writer.begin)
    for name, tensor in exporter.stream():  # to its end, whatever happens here: other ranks send
        attempt(writer.add, name, tensor)
    if is_first:
        attempt(writer.finish)
        if failure:
            writer.discard()
    shared = [failure]
    dist.broadcast_object_list(shared, src=0)
    if shared[0]:
        raise UserError(f"cannot be written ({shared[0]})", where=str(folder), expected="a place with room for it")
