"""What the workers do: train with the policy's memory given back between updates, and without."""

from __future__ import annotations

from typing import Any

import layout_work
import torch

from vespo_megatron.megatron import parallel
from vespo_megatron.megatron.parked_memory import PARTS
from vespo_megatron.megatron.policy import MegatronPolicy


def build(folder: str, layout: dict[str, Any], store: str, precision: str) -> MegatronPolicy:
    config = layout_work.policy_config(folder, layout).with_values({"precision": precision})
    rank_info = parallel.initialize(config.megatron_cfg, seed=1, device=torch.device("cpu"), init_method=store)
    return MegatronPolicy(config, rank_info, total_updates=8)


def step_by_step(
    folder: str, layout: dict[str, Any], store: str, precision: str, parked: bool
) -> list[dict[str, torch.Tensor]]:
    """This rank's weights, norms and optimizer state after each of three updates, by name.

    With `parked` everything is away between two updates, in the order of a colocated run: gradients and optimizer,
    then parameters, which come back once alone (a server needs weights in the middle of a rollout).
    """
    policy = build(folder, layout, store, precision)
    seen = []
    for number in range(3):
        batches = layout_work.micro_batches(policy, layout_work.ragged_batch(number))
        log_probs = policy.log_probs(batches)
        result = policy.update(batches, layout_work.weighted_loss)
        if parked:
            policy.memory.park("gradients", "optimizer")
            for _ in policy.exporter.stream():
                pass
            policy.memory.park("parameters")
            assert policy.memory.parked == set(PARTS) and _held(policy) == 0
            policy.memory.restore("parameters")
            for _ in policy.exporter.stream():
                pass
            policy.memory.park("parameters", "gradients")
            policy.memory.restore()
            assert not policy.memory.parked
        weights = {f"weight {index}": tensor.clone() for index, tensor in enumerate(policy.weights())}
        state = {f"optimizer {index}": tensor.clone() for index, tensor in enumerate(_optimizer_tensors(policy))}
        outputs = {f"log-probs {index}": output for index, output in enumerate(log_probs)}
        seen.append({**weights, **state, **outputs, "norm": torch.tensor(result.grad_norm)})
    return seen


def sizes(folder: str, layout: dict[str, Any], store: str, precision: str) -> dict[str, Any]:
    """Bytes of each part before, while it is away and after; what is kept on the host; what a parked policy says."""
    policy = build(folder, layout, store, precision)
    policy.update(layout_work.micro_batches(policy, layout_work.ragged_batch()), layout_work.weighted_loss)
    before = {part: policy.memory.nbytes(part) for part in PARTS}
    total = _held(policy)
    policy.memory.park(*PARTS)
    away = {part: policy.memory.nbytes(part) for part in PARTS}
    held, refused = _held(policy), []
    for use in (policy.weights, lambda: policy.compute_gradients([], layout_work.weighted_loss)):
        try:
            use()
        except RuntimeError as error:
            refused.append(str(error))
    policy.memory.restore()
    gradients = [buffer.grad_data.abs().max().item() for buffer in _buffers(policy)]
    return {
        "before": before,
        "total": total,
        "away": away,
        "held": held,
        "host": policy.memory.host_bytes,
        "after": _held(policy),
        "refused": refused,
        "gradients": max(gradients),
    }


def _buffers(policy: MegatronPolicy) -> list[Any]:
    return [buffer for chunk in policy.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def _optimizer_tensors(policy: MegatronPolicy) -> list[torch.Tensor]:
    """Main parameters and moments, found in another way than the code does."""
    tensors = []
    for part in policy.optimizer.chained_optimizers:
        for main, state in part.optimizer.state.items():
            tensors += [main.detach(), *(value for value in state.values() if torch.is_tensor(value))]
    return tensors


def _held(policy: MegatronPolicy) -> int:
    """Bytes of all storages that weights, gradients and optimizer state lie in."""
    tensors = [*_optimizer_tensors(policy), *(buffer.grad_data for buffer in _buffers(policy))]
    tensors += [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    tensors += [buffer.param_data for buffer in _buffers(policy) if buffer.param_data is not None]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
