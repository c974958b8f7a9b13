"""What a layout's processes really hold: weights, gradients, optimizer state, and what a forward saves."""

from __future__ import annotations

from typing import Any

import layout_work
import numpy as np
import torch

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.sample import Sample
from vespo_megatron.megatron import parallel
from vespo_megatron.megatron.policy import MegatronPolicy

LENGTH, SAMPLES = 64, 16


def equal_batch() -> Batch:
    """Sixteen samples of one prompt token and 63 response tokens."""
    generator = np.random.default_rng(0)
    samples = [
        Sample(
            sample_id=f"s{index}",
            prompt_id=f"p{index}",
            prompt_ids=generator.integers(0, layout_work.VOCAB, 1),
            response_ids=generator.integers(0, layout_work.VOCAB, LENGTH - 1),
            behavior_log_probs=np.full(LENGTH - 1, -5.0),
            weight_versions=np.zeros(LENGTH - 1),
            finish_reason="stop",
        )
        for index in range(SAMPLES)
    ]
    return Batch(samples, np.ones(SAMPLES, dtype=np.float32))


def held(folder: str, layout: dict[str, Any], store: str, precision: str, micro_batches: int) -> dict[str, int]:
    """Bytes by what they are for, on this rank; `stage` is its pipeline stage."""
    config = layout_work.policy_config(folder, layout).with_values({"precision": precision})
    rank_info = parallel.initialize(config.megatron_cfg, seed=1, device=torch.device("cpu"), init_method=store)
    policy = MegatronPolicy(config, rank_info)
    batches = layout_work.micro_batches(policy, equal_batch(), micro_batches)
    saved = _Saved(parameter for chunk in policy.chunks for parameter in chunk.parameters())
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        policy.update(batches, layout_work.weighted_loss)
    buffers = [b for chunk in policy.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return {
        "stage": rank_info.pipeline_rank,
        "tokens": batches[0].input_ids.numel(),
        "weights": sum(p.nbytes for chunk in policy.chunks for p in chunk.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": _optimizer_bytes(policy),
        "activations": saved.at_first_use,
    }


def _optimizer_bytes(policy: MegatronPolicy) -> int:
    total = 0
    for optimizer in policy.optimizer.chained_optimizers:
        states = optimizer.optimizer.state.items()
        total += sum(t.nbytes for _, state in states for t in state.values() if torch.is_tensor(t) and t.dim())
        if policy.dtype is not torch.float32:
            total += sum(main.nbytes for main, _ in states)
    return total


class _Saved:
    """Storages that the autograd graph holds when its backward begins, but for parameters'."""

    def __init__(self, parameters) -> None:
        self.own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.sizes: dict[int, int] = {}
        self.at_first_use = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.at_first_use = self.at_first_use or sum(self.sizes.values())
        return tensor
