"""Parallel set-up (process group, megatron-core's parallel state, seeds) and this process's place in it."""

from __future__ import annotations

import datetime
import gc
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vespo_megatron.errors import UserError
from vespo_megatron.megatron import cpu_runtime
from vespo_megatron.recipe.schema import MegatronConfig
from vespo_megatron.run.peers import refuse_strangers
from vespo_megatron.run.rendezvous import open_store

cpu_runtime.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402  (after the CPU runtime)


@dataclass(frozen=True)
class RankInfo:
    """This process in the parallel layout: its rank and the size of every dimension, and its device."""

    rank: int
    world_size: int
    device: torch.device
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    expert_rank: int
    expert_size: int
    expert_tensor_rank: int
    expert_tensor_size: int

    @property
    def is_last_stage(self) -> bool:
        """Whether this pipeline rank holds the output layer (in its last model chunk)."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reports(self) -> bool:
        """One process per (data, context) shard of the last stage speaks for its tensor parallel group."""
        return self.is_last_stage and self.tensor_rank == 0


def pick_device(wanted: str) -> torch.device:
    """'auto', 'cuda' or 'cpu' → this process's device."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def initialize(config: MegatronConfig, *, seed: int, device: torch.device, init_method: str | None = None) -> RankInfo:
    """Join the process group (unless there is one), lay out megatron-core's parallel state and seed it.

    Reads RANK and WORLD_SIZE, and without `init_method` where the ranks meet (`run.rendezvous`).

    Raises:
        UserError: the device is the CPU, and a GPU is there that megatron-core would use; the ranks cannot meet; a
            stranger has connected.
    """
    if device.type == "cpu" and not cpu_runtime.installed():
        raise UserError(
            "is cpu, but this process sees a GPU, where megatron-core would compute",
            where="cluster.device",
            fix="hide it: CUDA_VISIBLE_DEVICES= in the environment of every trainer process",
        )
    timeout = datetime.timedelta(seconds=config.distributed_timeout)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=init_method,
            store=open_store(rank, world_size, config.distributed_timeout) if init_method is None else None,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        distributed_timeout_minutes=max(1, round(config.distributed_timeout / 60)),
        create_gloo_process_groups=device.type == "cuda",
    )
    refuse_strangers()  # gloo's groups have connected, and nothing that came through them was unpickled yet
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return rank_info(device)


def rank_info(device: torch.device) -> RankInfo:
    """What megatron-core's parallel state says of this process."""
    state = parallel_state
    return RankInfo(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        tensor_rank=state.get_tensor_model_parallel_rank(),
        tensor_size=state.get_tensor_model_parallel_world_size(),
        pipeline_rank=state.get_pipeline_model_parallel_rank(),
        pipeline_size=state.get_pipeline_model_parallel_world_size(),
        context_rank=state.get_context_parallel_rank(),
        context_size=state.get_context_parallel_world_size(),
        data_rank=state.get_data_parallel_rank(),
        data_size=state.get_data_parallel_world_size(),
        expert_rank=state.get_expert_model_parallel_rank(),
        expert_size=state.get_expert_model_parallel_world_size(),
        expert_tensor_rank=state.get_expert_tensor_parallel_rank(),
        expert_tensor_size=state.get_expert_tensor_parallel_world_size(),
    )


def finalize() -> None:
    """Leave the parallel state and the process group, and give back their threads and sockets.

    A gloo group lives as long as anything refers to it, and polls with two threads meanwhile. Models refer to groups
    and are cycles, and `RotaryEmbedding.forward` caches models (rotary_pos_embedding.py:178).
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()
    parallel_state.destroy_model_parallel()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def tensor_group() -> dist.ProcessGroup:
    """The ranks that hold the other shards of this rank's weights, and of its tokens where they are sharded."""
    return parallel_state.get_tensor_model_parallel_group()


def context_parallel_group() -> dist.ProcessGroup:
    """The ranks that hold the other pieces of this rank's sequences."""
    return parallel_state.get_context_parallel_group()


def data_context_parallel_group() -> dist.ProcessGroup:
    """The data × context parallel ranks of this pipeline stage: those whose per-token metrics add up."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def context_tensor_group() -> dist.ProcessGroup:
    """The tensor × context parallel ranks: those that hold the other tokens of this rank's micro-batches."""
    return parallel_state.get_tensor_and_context_parallel_group()


def stage_group() -> dist.ProcessGroup:
    """The tensor × context × data parallel ranks of this pipeline stage: those whose rows of a layer add up."""
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def pipeline_group() -> dist.ProcessGroup:
    """The stages one micro-batch passes through."""
    return parallel_state.get_pipeline_model_parallel_group()
