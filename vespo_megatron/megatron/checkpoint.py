"""Policy checkpoints by megatron-core's `dist_checkpointing`: any parallel layout saves, any other loads.

Weights, the optimizer's float32 weights and moments, and the schedule. Every rank writes its own shards; a tensor that
several ranks hold is written by one of them. Loading into the same layout is exact to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter

from vespo_megatron.errors import UserError
from vespo_megatron.megatron import hf_weights
from vespo_megatron.megatron.checkpoint_names import is_extra_state, name_as_saved
from vespo_megatron.megatron.checkpoint_pickles import data_only
from vespo_megatron.megatron.optimizer_state import (
    TORCH_ADAMS,
    count_in_whole_numbers,
    drop_what_is_of_hybrids,
    make_moments,
    move_steps,
    parts_of,
    settle,
)
from vespo_megatron.megatron.parameter_gather import finish_parameter_gather
from vespo_megatron.megatron.policy import MegatronPolicy

# isort: split
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import AsyncSaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Write = Callable[[], None]
"""Writes this rank's shards; raises one of `FAILURES` on every rank when it fails on one."""
FAILURES = (Exception, CheckpointException)
"""What saving and loading may raise; torch's own is no `Exception`."""

# megatron-core writes process groups into the copies it is given.
_METADATA = {
    # The distributed optimizer's flat buffers as tensors of the parameters' shapes: independent of the layout.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


def save(policy: MegatronPolicy, folder: Path, *, group: dist.ProcessGroup | None = None) -> Write:
    """Copy the policy's state and return what writes it to `folder`, which must exist and be empty. A collective.

    Args:
        group: a gloo group of all ranks that nothing else uses: the write may then run in a thread beside training.
    """
    for part in parts_of(policy.optimizer):
        make_moments(part)
    state = _state(policy, is_loading=False)
    state["rng"] = _rng_state(policy)
    return _save(state, folder, group)


def load(policy: MegatronPolicy, folder: Path, *, same_layout: bool) -> None:
    """Bring the policy to the state in `folder`. A collective.

    Args:
        same_layout: it was saved by as many ranks in the same layout, so that each finds its own random state.

    Raises:
        UserError: the folder holds another model, or cannot be read.
    """
    for part in parts_of(policy.optimizer):
        make_moments(part)
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, TORCH_ADAMS):
            _keep_steps(part)
    state = _state(policy, is_loading=True)
    if same_layout:
        state["rng"] = _rng_state(policy)
    loaded = _load(state, folder)
    _fill(policy.chunks, loaded)
    move_steps(policy.optimizer, loaded["optimizer"])
    policy.optimizer.load_state_dict(loaded["optimizer"])
    count_in_whole_numbers(policy.optimizer)
    settle(policy.optimizer)
    policy.scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        _set_rng_state(loaded["rng"])


def save_weights(chunks: Sequence[torch.nn.Module], folder: Path, *, group: dist.ProcessGroup | None = None) -> Write:
    """As `save`, of the weights alone."""
    return _save(_model_state(chunks), folder, group)


def load_weights(chunks: Sequence[torch.nn.Module], folder: Path) -> None:
    """Fill the chunks with the weights in `folder`, whatever else it holds. A collective; raises as `load` does."""
    _fill(chunks, _load(_model_state(chunks), folder))


def _save(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> Write:
    request = dist_checkpointing.save(
        state, str(folder), _TorchWriter(group), async_sharded_save=True, content_metadata=dict(_METADATA)
    )
    return lambda: request.async_fn(*request.async_fn_args)


def _load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        with data_only():
            name_as_saved(state, folder)
            return dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    except FAILURES as error:
        raise UserError(
            f"cannot be loaded ({reason(error)})",
            where=str(folder),
            expected="a checkpoint of this model",
            fix="name another one; to resume from an older one remove this one",
        ) from error


def reason(error: BaseException) -> str:
    """What went wrong, in one line, on the first rank where it did."""
    while isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def _model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    finish_parameter_gather(chunks)  # those saved are the last update's, and none arrive after those loaded
    states = {}
    for key, chunk in _named(chunks):
        state = hf_weights.unwrap(chunk).sharded_state_dict(metadata=dict(_METADATA))
        states[key] = {name: value for name, value in state.items() if not is_extra_state(name)}
    return states


def _fill(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for key, chunk in _named(chunks):
        missing, unexpected = hf_weights.unwrap(chunk).load_state_dict(loaded[key], strict=False)
        if wrong := [*unexpected, *(name for name in missing if not is_extra_state(name))]:
            raise RuntimeError(f"{len(wrong)} tensors of the model and its checkpoint do not match, {wrong[0]} first")


def _named(chunks: Sequence[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """The chunks under Megatron-LM's keys."""
    return [("model" if len(chunks) == 1 else f"model{index}", chunk) for index, chunk in enumerate(chunks)]


def _state(policy: MegatronPolicy, *, is_loading: bool) -> dict[str, Any]:
    model = _model_state(policy.chunks)
    optimizer = policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(_METADATA))
    drop_what_is_of_hybrids(optimizer)
    return {**model, "optimizer": optimizer, "scheduler": policy.scheduler.state_dict()}


def _keep_steps(part: DistributedOptimizer) -> None:
    """distrib_optimizer.py:939 copies every entry of a parameter's state, of which line 2103 leaves out the step."""
    copy_entries = type(part)._set_main_param_and_optimizer_states

    def with_step(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        own = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        copy_entries(part, model_param, {"step": own["step"], **tensors})

    part._set_main_param_and_optimizer_states = with_step


def _rng_state(policy: MegatronPolicy) -> ShardedObject:
    """This rank's generators: the host's, the device's and megatron-core's per parallel region."""
    state = {
        "host": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "regions": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    rank_info = policy.rank_info
    return ShardedObject("rng", state, (rank_info.world_size,), (rank_info.rank,), replica_id=0)


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["host"])
    if state["device"].shape != torch.cuda.get_rng_state().shape:
        return  # saved on another kind of device, whose generators are not this one's
    torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["regions"])


class _TorchWriter(AsyncSaveShardedStrategy):
    """megatron-core's format, written by torch.distributed.checkpoint in threads.

    megatron-core's own writer forks a process per file and keeps a manager process (filesystem_async.py:54 and 266);
    forks of a process with gloo's threads and an event loop may hang, and orphans would stay behind.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__("torch_dist", 1)
        self.group = group

    def can_handle_sharded_objects(self) -> bool:
        return True

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> AsyncRequest:
        for tensor in nested_values(sharded_state_dict):
            if isinstance(tensor, ShardedTensor) and tensor.data is not None:
                tensor.data = tensor.data.detach().to("cpu", copy=True)
        plain, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        return AsyncRequest(self._write, (mcore_to_pyt_state_dict(plain, False), Path(checkpoint_dir)), [])

    def _write(self, state: dict[str, Any], folder: Path) -> None:
        torch.distributed.checkpoint.save(
            state,
            storage_writer=FileSystemWriter(folder, single_file_per_rank=True, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=self.group,
        )
        if dist.get_rank() == 0:  # where megatron-core would first meet all ranks in the group that trains
            save_config(CheckpointingConfig(self.backend, self.version), str(folder))
