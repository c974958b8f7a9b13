"""The policy's device memory, given back for a while: parameters, gradients and optimizer state of one rank.

Storages are emptied and filled again in place, so that every view of them stays what it was: a parameter, its slice of
a DDP buffer, the distributed optimizer's shard of it. megatron-core's own `offload_to_cpu` makes new tensors
(optimizer.py:344), of which views know nothing. What is kept waits in host memory, pinned beside a GPU, and comes back
to the last bit; gradients are not kept, and come back as zeros. On a CPU the same happens to the same storages.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch

from vespo_megatron.errors import UserError
from vespo_megatron.megatron.host_memory import return_free_memory
from vespo_megatron.megatron.host_weights import HostWeights
from vespo_megatron.megatron.optimizer_state import parts_of
from vespo_megatron.megatron.parameter_gather import finish_parameter_gather

# isort: split
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

Part = Literal["parameters", "gradients", "optimizer"]
PARTS: tuple[Part, ...] = get_args(Part)

_PATIENCE_S = 30.0
"""SGLang may say that memory is free before it is (slime #579): so long it is waited for."""
_POLL_S = 0.5


class ParkedMemory:
    """See the module. Parking is a collective where a parameter gather is unfinished; restoring is not.

    Args:
        chunks: this rank's, in megatron-core's DDP.
        optimizer: over them.
        device: where both are; tensors elsewhere (an optimizer that computes on the host) stay as they are.
    """

    def __init__(self, chunks: Sequence[MegatronModule], optimizer: MegatronOptimizer, device: torch.device) -> None:
        self._chunks, self._optimizer, self._device = chunks, optimizer, device
        self._away: dict[Part, list[tuple[torch.UntypedStorage, int]]] = {}
        """Of each part that is parked, its storages and their sizes in bytes."""
        self._kept: dict[Part, HostWeights] = {}
        self._kept_sizes: dict[Part, list[int]] = {}

    @property
    def parked(self) -> frozenset[Part]:
        """What is away."""
        return frozenset(self._away)

    @property
    def host_bytes(self) -> int:
        """Host memory of what was kept; it stays allocated for the next time."""
        return sum(kept.nbytes for kept in self._kept.values())

    def nbytes(self, part: Part) -> int:
        """Device memory of a part, in bytes; what it will be again where it is away."""
        if part in self._away:
            return sum(size for _, size in self._away[part])
        return sum(storage.nbytes() for storage in self._storages()[part])

    def park(self, *parts: Part) -> None:
        """Give back the memory of these parts, and what the allocator holds free besides. Those away stay away."""
        leaving = [part for part in parts if part not in self._away]
        if leaving:
            finish_parameter_gather(self._chunks)
            if "gradients" in leaving:
                self._drop_copies_of_gradients()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # other streams have their part in an update
            found = self._storages()
            for part in leaving:
                storages = found[part]
                if part != "gradients":
                    self._keep(part, storages)
                self._away[part] = [(storage, storage.nbytes()) for storage in storages]
                for storage in storages:
                    storage.resize_(0)
        return_cached_memory(self._device)

    def restore(self, *parts: Part) -> None:
        """Take the memory of these parts again (none: of all), and what was in it; gradients are zeros.

        Raises:
            UserError: the device has no room for it, though it was waited for.
        """
        for part in parts or PARTS:
            for storage, size in self._away.get(part, ()):
                _allocate(storage, size, self._device)
            arriving = [_bytes_of(storage) for storage, _ in self._away.pop(part, ())]
            if part == "gradients":
                for each in arriving:
                    each.zero_()
            elif arriving:
                self._kept[part].copy_to(arriving)

    def check_here(self, *parts: Part) -> None:
        """Raise RuntimeError where one of these is away: its tensors have no memory that a kernel could use."""
        if missing := self.parked & set(parts):
            raise RuntimeError(f"{', '.join(sorted(missing))} of the policy are parked; restore them first")

    def _keep(self, part: Part, storages: Sequence[torch.UntypedStorage]) -> None:
        tensors, sizes = [_bytes_of(storage) for storage in storages], [storage.nbytes() for storage in storages]
        if self._kept_sizes.get(part) != sizes:  # the first time, or moments were made since
            self._kept.pop(part, None)
            self._kept[part], self._kept_sizes[part] = HostWeights(tensors), sizes
        self._kept[part].copy_from(tensors)

    def _drop_copies_of_gradients(self) -> None:
        """An optimizer keeps gradients in its own dtype until the next update begins."""
        self._optimizer.zero_grad()
        for optimizer in self._whole_optimizers():
            for group in optimizer.param_groups:
                for tensor in group["params"]:
                    tensor.grad = None

    def _storages(self) -> dict[Part, list[torch.UntypedStorage]]:
        """Each part's storages, every one once: in float32 the optimizer's shards are views of the parameters."""
        buffers = [buffer for chunk in self._chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        tensors: dict[Part, Iterable[torch.Tensor]] = {
            "parameters": (parameter for chunk in self._chunks for parameter in chunk.parameters()),
            "gradients": (buffer.grad_data for buffer in buffers),
            "optimizer": self._optimizer_tensors(),
        }
        seen: set[int] = set()
        found: dict[Part, list[torch.UntypedStorage]] = {}
        for part, own in tensors.items():
            if part in self._away:
                found[part] = []
                seen |= {storage._cdata for storage, _ in self._away[part]}
                continue
            found[part] = []
            for tensor in own:
                storage = tensor.untyped_storage()
                if tensor.device.type == self._device.type and storage._cdata not in seen and storage.nbytes():
                    seen.add(storage._cdata)
                    found[part].append(storage)
        return found

    def _optimizer_tensors(self) -> Iterator[torch.Tensor]:
        yield from self._main_parameters()
        for optimizer in self._torch_optimizers():
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def _main_parameters(self) -> Iterator[torch.Tensor]:
        for optimizer in self._torch_optimizers():
            for group in optimizer.param_groups:
                yield from group["params"]

    def _torch_optimizers(self) -> Iterator[torch.optim.Optimizer]:
        for optimizer in self._whole_optimizers():
            yield optimizer
            yield from getattr(optimizer, "sub_optimizers", ())  # `optimizer_cpu_offload` in part

    def _whole_optimizers(self) -> Iterator[torch.optim.Optimizer]:
        for part in parts_of(self._optimizer):
            if not getattr(part, "is_stub_optimizer", False):  # a rank without parameters of its kind
                yield part.optimizer


def return_cached_memory(device: torch.device) -> None:
    """Give the allocator's free blocks back to the device, where another process may have them.

    Blocks that were shared by CUDA IPC (weight buckets) are free once the other side has closed them.
    """
    if device.type == "cuda":
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
    else:
        return_free_memory()


def _allocate(storage: torch.UntypedStorage, size: int, device: torch.device) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            storage.resize_(size)
            return
        except torch.OutOfMemoryError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"has no room for {size >> 20} MiB that the trainer had there before the servers' turn",
                    where=str(device),
                    expected="that servers have given back what they took",
                    fix="lower policy.generation.sglang_cfg.mem_fraction_static; see `vespo-megatron plan`",
                ) from error
            return_cached_memory(device)
            time.sleep(_POLL_S)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
