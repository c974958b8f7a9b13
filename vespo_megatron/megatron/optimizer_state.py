"""An Adam's state in checkpoints: before its first step, and where it counts steps.

PyTorch's counts in each parameter's state, in floating point; Transformer Engine's in its groups, in whole numbers that
its kernel insists on (csrc/extensions.h:415 of 2.9). megatron-core's distributed optimizer carries the number between
the two places, as it is; the other one saves it where its Adam has it (optimizer.py:1034). So that a checkpoint of one
Adam goes on in the other, steps are moved here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

# isort: split
from megatron.core.optimizer import Adam, MegatronOptimizer

TORCH_ADAMS = (torch.optim.Adam, torch.optim.AdamW)


def parts_of(optimizer: MegatronOptimizer) -> Sequence[MegatronOptimizer]:
    """megatron-core's optimizers of dense and of expert parameters."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def make_moments(part: MegatronOptimizer) -> None:
    """Its Adam's state before the first step, which megatron-core takes for granted (distrib_optimizer.py:642, 908)."""
    optimizer = part.optimizer
    in_groups = not isinstance(optimizer, TORCH_ADAMS)
    if in_groups and (not isinstance(optimizer, Adam) or part.config.use_precision_aware_optimizer):
        return
    for group in optimizer.param_groups:
        if in_groups:
            group.setdefault("step", 0)
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                if not in_groups:  # a fused Adam counts beside its parameter
                    moments["step"] = torch.zeros((), device=parameter.device)
                optimizer.state[parameter] = moments


def move_steps(optimizer: MegatronOptimizer, saved: dict[Any, Any]) -> None:
    """Put the steps of a loaded state to where `optimizer` looks for them, before it loads it."""
    in_groups = not any(isinstance(part.optimizer, TORCH_ADAMS) for part in parts_of(optimizer))
    for state, groups in _inner_states(saved):
        if in_groups:
            if (step := state.pop("common_step", None)) is not None:
                for group in groups:
                    group["step"] = int(step)
        elif state and "common_step" not in state:
            state["common_step"] = torch.tensor(float(next(group["step"] for group in groups if "step" in group)))


def count_in_whole_numbers(optimizer: MegatronOptimizer) -> None:
    """What `optimizer` has loaded into its groups, as Transformer Engine's kernel takes it."""
    for group in (group for part in parts_of(optimizer) for group in part.optimizer.param_groups):
        if "step" in group:
            group["step"] = int(group["step"])


def _inner_states(saved: dict[Any, Any]) -> Iterator[tuple[dict[Any, Any], list[dict[str, Any]]]]:
    """(states of parameters, groups) of every optimizer in a loaded state, without distributed ones."""
    if "param_groups" in saved and "state" in saved:
        yield saved["state"], saved["param_groups"]
        return
    for inner in saved.values():
        if isinstance(inner, dict):
            yield from _inner_states(inner)
