"""What the ranks of `test_keys_of_timing` run: five steps, and what leaves the trainer on the way."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from layout_work import gradients, micro_batches, policy_config, ragged_batch, weighted_loss, weights
from safetensors.torch import load_file

from vespo_megatron.megatron import checkpoint as policy_checkpoint
from vespo_megatron.megatron import hf_weights, parallel
from vespo_megatron.megatron.policy import MegatronPolicy

STEPS, SAVED = 5, 3


def five_steps(
    folder: str,
    sizes: dict[str, Any],
    keys: dict[str, Any],
    store: str,
    scratch: str,
    precision: str = "float32",
    in_thread: bool = False,
) -> list[dict[str, Any]]:
    """Each step's gradient, metrics and weights; then of a policy that resumes after step `SAVED`, those that follow.

    A checkpoint is written before anything else has read the weights of its step, weights are exported and sent by
    turns, and gradients are read in between as `replay-step` reads them.
    """
    config = policy_config(folder, sizes | keys).with_values({"precision": precision})
    rank_info = parallel.initialize(config.megatron_cfg, seed=1, device=torch.device("cpu"), init_method=store)
    group = torch.distributed.new_group(backend="gloo") if in_thread else None
    policy = MegatronPolicy(config, rank_info, total_updates=STEPS)
    batches = micro_batches(policy, ragged_batch(), count=2)
    steps = [_step(policy, batches, Path(scratch), number, group) for number in range(1, STEPS + 1)]
    plain = MegatronPolicy(policy_config(folder, sizes).with_values({"precision": precision}), rank_info)
    policy_checkpoint.load_weights(plain.chunks, Path(scratch) / "saved")
    resumed = {"weights": weights(plain)}
    again = MegatronPolicy(config, rank_info, total_updates=STEPS)
    policy_checkpoint.load(again, Path(scratch) / "saved", same_layout=True)
    return [*steps, resumed, *(_step(again, batches, Path(scratch), number, group) for number in (SAVED + 1, STEPS))]


def _step(policy: MegatronPolicy, batches: list, scratch: Path, number: int, group: Any) -> dict[str, Any]:
    facts = gradients(policy, batches, weighted_loss)["gradients"] if number in (1, 3) else {}
    result = policy.update(batches, weighted_loss)
    found: dict[str, Any] = {
        "gradients": facts,
        "metrics": (result.grad_norm, result.learning_rate, result.succeeded, [float(each) for each in result.reports]),
    }
    if number == SAVED and not (scratch / "saved" / "metadata.json").exists():
        target = scratch / "saved"
        target.mkdir(exist_ok=True)
        torch.distributed.barrier()
        policy_checkpoint.save(policy, target)()
        torch.distributed.barrier()
    if number % 2:
        found["weights"] = weights(policy)
    else:
        target = Path(tempfile.mkdtemp(dir=scratch)) if policy.rank_info.rank == 0 else scratch
        hf_weights.save(policy.exporter, target, copy_from=policy.model_folder)
        files = sorted(target.glob("*.safetensors")) if policy.rank_info.rank == 0 else []
        found["weights"] = {name: tensor for file in files for name, tensor in load_file(file).items()}
    found["log_probs"] = [output.sum(1) for output in policy.log_probs(batches)]
    return found
