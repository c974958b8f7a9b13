"""`vespo-megatron replay-step BUNDLE`: a skipped update again, on one process, one sample at a time.

Says for every sample with a number that is not finite where that appears first: in the data, the weights, the output of
a layer, the log-probs, the loss, or going backward. Finding nothing is an answer too: then the fault was not in the
numbers but on a rank (its device, a kernel, a collective), which the bundle names. Where the objective uses π_old
(`loss_fn.behavior: recompute` or `version`) it is taken from the bundle's weights, hence equal to π_θ.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vespo_megatron.data.batch import Batch
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.trainer import bundle


@dataclass
class _Trace:
    """Where, in the order of computing, something was not finite first."""

    first: str = ""

    def look(self, where: str, value: Any) -> None:
        """Remember `where` when nothing was found before and a tensor in `value` is not finite."""
        if self.first:
            return
        values = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(each, torch.Tensor) and not bool(torch.isfinite(each).all()) for each in values):
            self.first = where


def replay(folder: Path) -> str:
    """Run the bundle's update again; what to print. Starts a process group of one, and changes nothing in `folder`."""
    found = bundle.read(folder)
    recipe = on_one_process(found.recipe, folder, len(found.batch))
    lines = [f"step {found.step}, update {found.update}: not finite in the run: {found.not_finite}"]
    with tempfile.TemporaryDirectory() as store, _alone():
        answers = _run(recipe, found.batch, f"file://{store}/store")
    bad = [(name, where) for name, where in answers if where]
    lines += [f"  {name}: {where}" for name, where in bad[:20]]
    if len(bad) > 20:
        lines.append(f"  and {len(bad) - 20} more samples")
    if bad:
        lines.insert(1, f"first on one process: sample {bad[0][0]}: {bad[0][1]}")
    else:
        lines.append(
            f"all of its {len(answers)} samples are finite on one process: look at the rank, not at the samples "
            "(its device, a kernel, the parallel layout)"
        )
    return "\n".join(lines)


def on_one_process(recipe: Recipe, folder: Path, num_samples: int) -> Recipe:
    """The recipe with every parallel size 1, one sample per micro-batch, one update, and the bundle's weights."""
    weights = folder / bundle.WEIGHTS
    megatron = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "sequence_parallel": False,
    }
    return recipe.with_values(
        {f"policy.megatron_cfg.{name}": value for name, value in megatron.items()}
        | {
            "cluster.gpus_per_node": 1,
            "cluster.num_nodes": 1,
            "policy.sequence_packing.enabled": False,
            "policy.train_micro_batch_size": 1,
            "policy.train_global_batch_size": num_samples,
            "loss_fn.on_bad_sample": "drop",  # they are what is looked for
            # What overflows float16 at a larger scale is no fault.
            "policy.megatron_cfg.optimizer.initial_loss_scale": recipe.policy.megatron_cfg.optimizer.min_loss_scale,
        }
        | ({"policy.model_name": str(weights)} if weights.is_dir() else {})
    )


def _run(recipe: Recipe, batch: Batch, init_method: str) -> list[tuple[str, str]]:
    """(sample id, where the first number that is not finite is, or '') for every sample."""
    from vespo_megatron.megatron import parallel
    from vespo_megatron.megatron.policy import MegatronPolicy
    from vespo_megatron.trainer.objective import Objective
    from vespo_megatron.trainer.step import TrainStep

    device = parallel.pick_device(recipe.cluster.device)
    rank_info = parallel.initialize(
        recipe.policy.megatron_cfg, seed=recipe.grpo.seed, device=device, init_method=init_method
    )
    policy = MegatronPolicy(recipe.policy, rank_info)
    step = TrainStep(recipe, policy, Objective(recipe.loss_fn, recipe.behavior))
    weights = _Trace()
    for name, parameter in _named(policy, "named_parameters"):
        weights.look(f"weight {name}", parameter)
    if weights.first:
        parallel.finalize()
        return [(sample.sample_id, weights.first) for sample in batch.samples]
    if step.objective.needs_reference:
        policy.keep_reference()
    sliced = step.receive(batch)
    routes = step.routes(sliced)
    step.log_probs(sliced, routes)
    loss = step.objective.loss_function(sliced.normalizers[0])
    answers = []
    for micro_batch in sliced.micro_batches:
        trace = _Trace()
        sample = micro_batch.batch.samples[0]
        for name, values in (("μ", sample.behavior_log_probs), ("advantage", micro_batch.batch.advantages)):
            trace.look(f"data: {name}", torch.from_numpy(np.asarray(values)))
        with _watched(policy, trace):
            policy.compute_gradients(
                [micro_batch], _looking(loss, trace), routes=routes.update_pass(first=False), everywhere=True
            )
        for name, parameter in _named(policy, "named_parameters"):
            trace.look(f"backward: gradient of weight {name}", getattr(parameter, "main_grad", None))
        answers.append((sample.sample_id, trace.first))
    parallel.finalize()
    return answers


def _looking(loss: Callable, trace: _Trace) -> Callable:
    """`loss`, with what goes in and comes out looked at."""

    def function(log_probs: torch.Tensor, entropies: torch.Tensor, micro_batch: Any) -> Any:
        trace.look("forward: log-probs", log_probs)
        value, report = loss(log_probs, entropies, micro_batch)
        trace.look("objective: φ", report[0].coefficient)
        trace.look("objective: loss", value)
        if log_probs.requires_grad:
            log_probs.register_hook(lambda gradient: trace.look("backward: gradient of the log-probs", gradient))
        return value, report

    return function


def _named(policy: Any, what: str) -> Iterator[tuple[str, Any]]:
    from vespo_megatron.megatron.hf_weights import unwrap

    for chunk in policy.chunks:
        yield from getattr(unwrap(chunk), what)()


@contextmanager
def _watched(policy: Any, trace: _Trace) -> Iterator[None]:
    """Within the block every module's output and its gradient are looked at."""

    def watch(name: str) -> Callable:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            trace.look(f"forward: output of {name}", output)
            for each in output if isinstance(output, tuple) else (output,):
                if isinstance(each, torch.Tensor) and each.requires_grad:
                    each.register_hook(
                        lambda gradient: trace.look(f"backward: gradient of the output of {name}", gradient)
                    )

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in _named(policy, "named_modules") if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _alone() -> Iterator[None]:
    """The variables of a world of one; those of the caller come back."""
    wanted = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ |= wanted
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
