"""What the ranks of `test_checkpoint_layouts` run."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path
from typing import Any

import torch
from layout_work import build, micro_batches, ragged_batch, weighted_loss, weights

from vespo_megatron.errors import UserError
from vespo_megatron.megatron import checkpoint as policy_checkpoint
from vespo_megatron.megatron.micro_batch import MicroBatch
from vespo_megatron.megatron.policy import MegatronPolicy
from vespo_megatron.recipe.schema import CheckpointingConfig
from vespo_megatron.trainer.checkpoint import Checkpointer


def save_after_two_updates(folder: str, layout: dict[str, Any], store: str, checkpoint: str) -> dict[str, Any]:
    """Two updates, a checkpoint, a third update: log-probs and weights at the checkpoint and after the third."""
    policy = build(folder, layout, store)
    batches = micro_batches(policy, ragged_batch())
    for _ in range(2):
        policy.update(batches, weighted_loss)
    policy_checkpoint.save(policy, Path(checkpoint))()
    return state_and_next(policy, batches)


def load_and_go_on(
    folder: str, layout: dict[str, Any], store: str, checkpoint: str, same_layout: bool = False
) -> dict[str, Any]:
    """The same of a policy that loads the checkpoint into `layout`."""
    policy = build(folder, layout, store)
    policy_checkpoint.load(policy, Path(checkpoint), same_layout=same_layout)
    return state_and_next(policy, micro_batches(policy, ragged_batch()))


def state_and_next(policy: MegatronPolicy, batches: list[MicroBatch]) -> dict[str, Any]:
    before = weights(policy)
    outputs = policy.log_probs(batches)
    random = torch.rand(4)
    result = policy.update(batches, weighted_loss)
    rank_info = policy.rank_info
    return {
        "weights": before,
        "log_probs": [float(output[0].sum()) for output in outputs] if rank_info.reports and outputs else None,
        "next": {name: tensor - before[name] for name, tensor in weights(policy).items()},
        "random": random,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
    }


def save_with_faults(folder: str, layout: dict[str, Any], store: str, run_dir: str, spoil: str) -> dict[str, Any]:
    """Three saves, the second with no space on rank 1, the third spoiled on the disk: what is said, what is found."""
    policy = build(folder, layout, store)
    checkpointer = Checkpointer(CheckpointingConfig(timeout=60.0), policy, Path(run_dir))
    batches, rank = micro_batches(policy, ragged_batch()), policy.rank_info.rank
    facts = {"weight_version": 0}
    first = checkpointer.save(1, facts, wait=True)
    kept = weights(policy)
    policy.update(batches, weighted_loss)
    with no_space() if rank == 1 else contextlib.nullcontext():
        second = checkpointer.save(2, facts, wait=True)
    failures = checkpointer.pop_metrics()["checkpoint/failures"]
    third = checkpointer.save(3, facts, wait=True)
    if rank == 0 and third:
        spoil_file(Path(third), spoil)
    torch.distributed.barrier()
    try:
        found = checkpointer.find()
    except UserError as error:
        return {"saved": (first, second, third), "failures": failures, "error": str(error)}
    checkpointer.load(found)
    equal = all(torch.equal(kept[name], tensor) for name, tensor in weights(policy).items())
    return {"saved": (first, second, third), "failures": failures, "found": found.step, "equal": equal}


@contextlib.contextmanager
def no_space():
    """The kernel refuses to write more than some bytes to any file, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def spoil_file(checkpoint: Path, how: str) -> None:
    shard = checkpoint / "policy" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    if how == "bit":
        content[len(content) // 2] ^= 1
    elif how == "truncated":
        content = content[:-1]
    if how == "all":
        for each in checkpoint.parent.glob("step_*/policy/__0_0.distcp"):
            each.write_bytes(b"")
    elif how == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content)


def load_another_model(folder: str, layout: dict[str, Any], store: str, checkpoint: str) -> str:
    """What is said when the checkpoint is not of this model."""
    policy = build(folder, layout, store)
    try:
        policy_checkpoint.load(policy, Path(checkpoint), same_layout=True)
    except UserError as error:
        return str(error)
    return ""
