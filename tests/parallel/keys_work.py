"""What the ranks of `test_keys_of_timing` run: five steps, and all that leaves the trainer on the way."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist
from layout_work import CPU, build, gradients, micro_batches, policy_config, ragged_batch, weighted_loss, weights
from safetensors.torch import load_file

from vespo_megatron.megatron import checkpoint as policy_checkpoint
from vespo_megatron.megatron import hf_weights, parallel
from vespo_megatron.megatron.policy import MegatronPolicy
from vespo_megatron.recipe.schema import PolicyConfig

STEPS, SAVED = 5, 3
Keys = dict[str, Any]


def five_steps(
    folder: str,
    sizes: Keys,
    keys: Keys,
    store: str,
    scratch: str,
    precision: str = "float32",
    in_thread: bool = False,
    others: tuple[Keys, ...] = (),
) -> dict[str, list[dict[str, Any]]]:
    """What each step computes and what leaves it; the same of policies that go on from its checkpoints.

    The checkpoint of a step is written before anything else has read the weights, and they are sent and exported by
    turns. Gradients are read in between, as `replay-step` reads them.

    Args:
        keys: besides the parallel `sizes`, those under test.
        in_thread: whether checkpoints are written beside the next step.
        others: keys of policies that go on from the checkpoint besides one of the same keys.
    """

    def config(under_test: Keys) -> PolicyConfig:
        return policy_config(folder, sizes | under_test).with_values({"precision": precision})

    rank_info = parallel.initialize(config(keys).megatron_cfg, seed=1, device=CPU, init_method=store)
    policy = MegatronPolicy(config(keys), rank_info, total_updates=STEPS)
    batches = micro_batches(policy, ragged_batch(), count=2)
    group = dist.new_group(backend="gloo")
    first, saved = Path(scratch) / "first", Path(scratch) / "saved"
    _save(policy, first, group)()
    found: dict[str, list[dict[str, Any]]] = {"steps": []}
    writing = threading.Thread()
    for number in range(1, STEPS + 1):
        step = _update(policy, batches, number)
        if number == SAVED:
            writing = threading.Thread(target=_save(policy, saved, group))
            writing.start()
            if not in_thread:
                writing.join()
        found["steps"].append(step | _what_leaves(policy, batches, number, Path(scratch)))
    writing.join()
    dist.barrier()

    plain = MegatronPolicy(config({}), rank_info)
    policy_checkpoint.load_weights(plain.chunks, saved)
    found["saved"] = [{"weights": weights(plain)}]
    for index, other in enumerate((keys, *others)):
        again = MegatronPolicy(config(other), rank_info, total_updates=STEPS)
        policy_checkpoint.load(again, saved, same_layout=True)
        found[f"resumed {index}"] = [
            _update(again, batches, number) | _what_leaves(again, batches, number, Path(scratch))
            for number in range(SAVED + 1, STEPS + 1)
        ]
    policy_checkpoint.load(policy, first, same_layout=True)
    found["from the start"] = [_update(policy, batches, 1) | _what_leaves(policy, batches, 1, Path(scratch))]
    return found


def _save(policy: MegatronPolicy, folder: Path, group: Any) -> policy_checkpoint.Write:
    folder.mkdir(exist_ok=True)
    dist.barrier()
    return policy_checkpoint.save(policy, folder, group=group)


def _update(policy: MegatronPolicy, batches: list, number: int) -> dict[str, Any]:
    read = gradients(policy, batches, weighted_loss)["gradients"] if number % 2 else {}
    result = policy.update(batches, weighted_loss)
    metrics = [result.grad_norm, result.learning_rate, result.succeeded, *map(float, result.reports)]
    return {"gradients": read, "metrics": metrics}


def _what_leaves(policy: MegatronPolicy, batches: list, number: int, scratch: Path) -> dict[str, Any]:
    if number % 2:
        sent = weights(policy)
    else:
        hf_weights.save(policy.exporter, scratch / "hf", copy_from=policy.model_folder)
        dist.barrier()
        files = (scratch / "hf").glob("*.safetensors") if policy.rank_info.rank == 0 else ()
        sent = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {"weights": sent, "log_probs": policy.log_probs(batches)}


def own_gradients(folder: str, sizes: Keys, keys: Keys, store: str) -> list[tuple[bool, bool]]:
    """Whether this rank's own gradients and the sums were finite, where in every second pass rank 1's are not."""
    policy = build(folder, sizes | keys, store)
    batches = micro_batches(policy, ragged_batch(), count=2)

    def spoilt(log_probs, entropies, micro_batch):
        value, report = weighted_loss(log_probs, entropies, micro_batch)
        return value * (float("nan") if policy.rank_info.rank == 1 else 1.0), report

    answers = []
    for loss in (weighted_loss, spoilt, weighted_loss, spoilt):
        policy.compute_gradients(batches, loss)
        answers.append((policy.own_gradients_finite, policy.gradients_finite()))
    return answers
