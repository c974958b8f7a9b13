"""Which of a node's GPUs each process of a run gets: the trainer's first, the servers' behind, the same when colocated.

GPUs go by the names that CUDA_VISIBLE_DEVICES has for them: a number, the UUID of a GPU or of a MIG instance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe

VISIBLE = "CUDA_VISIBLE_DEVICES"
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""PyTorch reads its allocator's settings from these; the first is the newer name."""


@dataclass(frozen=True)
class NodeGPUs:
    """What each process of one node gets, by name."""

    trainer: tuple[str, ...]
    """One per trainer process; empty where no trainer runs on this node."""
    servers: tuple[tuple[str, ...], ...]
    """One entry per server, as many as its tensor parallel ranks."""

    def __str__(self) -> str:
        """For instance 'trainer on 0, 1; server 0 on 2; server 1 on 3'."""
        parts = [f"trainer on {', '.join(self.trainer)}"] if self.trainer else []
        return "; ".join(parts + [f"server {index} on {', '.join(own)}" for index, own in enumerate(self.servers)])


def gpu_count() -> int:
    """How many GPUs PyTorch offers this process. It asks the driver's library, so that forks may still use CUDA."""
    import torch

    return torch.cuda.device_count()


def visible_gpus(environment: Mapping[str, str], count: int) -> tuple[str, ...]:
    """The GPUs that CUDA offers a process with this environment.

    Args:
        count: how many it offers: CUDA ends the list at the first name that is no GPU's.
    """
    named = environment.get(VISIBLE)
    if named is None:
        return tuple(map(str, range(count)))
    return tuple(name.strip() for name in named.split(","))[:count]


def split(recipe: Recipe, gpus: Sequence[str], *, with_trainer: bool) -> NodeGPUs:
    """Hand out `gpus` to the trainer processes and the servers that a recipe starts on one node.

    Args:
        with_trainer: whether the trainer runs there, beside the servers.

    Raises:
        UserError: there are too few.
    """
    generation = recipe.policy.generation
    config = generation.sglang_cfg
    trainers = recipe.cluster.gpus_per_node if with_trainer else 0
    started = config.num_servers if generation.backend == "sglang" and not config.urls else 0
    share = config.tensor_parallel_size
    first = 0 if config.colocated or not with_trainer else trainers
    needed = max(trainers, first + started * share)
    if needed > len(gpus):
        asked = [f"{trainers} for the trainer"] if trainers else []
        asked += (
            [f"{started} × {share} for servers{' on the same ones' if config.colocated else ''}"] if started else []
        )
        raise UserError(
            f"asks for {needed} GPUs on this node ({' and '.join(asked)}), and there are {len(gpus)}"
            + (f": {', '.join(gpus)}" if gpus else ""),
            where="cluster.gpus_per_node" if trainers else "policy.generation.sglang_cfg.num_servers",
            fix="lower it or policy.generation.sglang_cfg.num_servers, set sglang_cfg.colocated, or use more nodes",
        )
    ends = range(first + share, first + started * share + 1, share)
    return NodeGPUs(tuple(gpus[:trainers]), tuple(tuple(gpus[end - share : end]) for end in ends))


def trainer_variables(recipe: Recipe, environment: Mapping[str, str], count: int) -> dict[str, str]:
    """What trainer processes see of a node with `count` GPUs; those that compute on the CPU see none.

    Raises:
        UserError: there are too few.
    """
    if recipe.cluster.device == "cpu":
        return {VISIBLE: ""}
    if count == 0:
        return {}
    return {VISIBLE: ",".join(split(recipe, visible_gpus(environment, count), with_trainer=True).trainer)}


def allocator_variables(recipe: Recipe, environment: Mapping[str, str]) -> dict[str, str]:
    """Of the trainer's processes, where its memory comes and goes: segments that grow leave no holes.

    Not where CUDA IPC shares blocks of them (`weight_transport: tensor`), which PyTorch can only do with rights that
    containers seldom give (pidfd_getfd). What the user has set stays.
    """
    generation = recipe.policy.generation
    moves = generation.shares_devices and generation.sglang_cfg.weight_transport != "tensor"
    if recipe.cluster.device == "cpu" or not moves or any(name in environment for name in ALLOCATOR):
        return {}
    return {ALLOCATOR[1]: "expandable_segments:True"}


def without_expandable_segments(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without that setting of the allocator; others of it stay."""
    result = dict(environment)
    for name in ALLOCATOR:
        kept = [each for each in result.pop(name, "").split(",") if each and "expandable_segments" not in each]
        if kept:
            result[name] = ",".join(kept)
    return result
