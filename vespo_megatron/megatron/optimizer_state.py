"""An Adam's state in checkpoints: before its first step, and where it counts steps.

PyTorch's counts in each parameter's state, in floating point; Transformer Engine's in its groups, in whole numbers that
its kernel insists on (csrc/extensions.h:415 of 2.9). megatron-core's distributed optimizer carries the number between
the two places, as it is; the other one saves it where its Adam has it (optimizer.py:1034). So that a checkpoint of one
Adam goes on in the other, steps are moved here. With `optimizer_cpu_offload` there are Adams inside of megatron-core's
`HybridDeviceOptimizer`, whose state is a copy of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

# isort: split
from megatron.core.optimizer import Adam, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

TORCH_ADAMS = (torch.optim.Adam, torch.optim.AdamW)
_OF_HYBRIDS = (
    "offload_fraction",
    "cpu_optimizer_cls",
    "gpu_optimizer_cls",
    "param_update_in_fp32",
    "pin_cpu_grads",
    "pin_cpu_params",
    "overlap_cpu_optimizer_d2h_h2d",
)
"""What a hybrid writes into its groups (hybrid_optimizer.py:66): its own business, and classes among it."""


def parts_of(optimizer: MegatronOptimizer) -> Sequence[MegatronOptimizer]:
    """megatron-core's optimizers of dense and of expert parameters."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def make_moments(part: MegatronOptimizer) -> None:
    """Its Adam's state before the first step, which megatron-core takes for granted (distrib_optimizer.py:642, 908)."""
    optimizer = part.optimizer
    if isinstance(optimizer, HybridDeviceOptimizer):
        for inner in optimizer.sub_optimizers:
            _make_moments(inner)
        optimizer._sync_sub_optimizers_state_to_hdo()
    elif isinstance(optimizer, TORCH_ADAMS) or (
        isinstance(optimizer, Adam) and not part.config.use_precision_aware_optimizer
    ):
        _make_moments(optimizer)


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    in_groups = not isinstance(optimizer, TORCH_ADAMS)
    for group in optimizer.param_groups:
        if in_groups:
            group.setdefault("step", 0)
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                if not in_groups:  # a fused Adam counts beside its parameter
                    moments["step"] = torch.zeros((), device=parameter.device)
                optimizer.state[parameter] = moments


def drop_what_is_of_hybrids(saved: dict[Any, Any]) -> None:
    """From the groups of a state that is to be saved, so that any Adam can go on with it."""
    for group in _groups(saved):
        for name in _OF_HYBRIDS:
            group.pop(name, None)


def settle(optimizer: MegatronOptimizer) -> None:
    """What has been loaded becomes each Adam's own, beside its parameters.

    megatron-core gives all parameters one step, on the host (distrib_optimizer.py:829), and a hybrid pieces of whole
    tensors; where both its Adams are PyTorch's, their state goes to the host (hybrid_optimizer.py:364).
    """
    for part in parts_of(optimizer):
        if isinstance(part.optimizer, TORCH_ADAMS):
            for parameter, state in part.optimizer.state.items():
                state["step"] = state["step"].to(parameter.device, copy=True)
        elif isinstance(part.optimizer, HybridDeviceOptimizer):
            for inner in part.optimizer.sub_optimizers:
                for parameter, state in inner.state.items():
                    own = {name: value for name, value in state.items() if name != "master_param"}
                    inner.state[parameter] = {
                        name: value.to(parameter.device, copy=True) if isinstance(value, torch.Tensor) else value
                        for name, value in own.items()
                    }
            part.optimizer._sync_sub_optimizers_state_to_hdo()


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


def _groups(saved: Any) -> Iterator[dict[str, Any]]:
    """Every optimizer's, in a state that is to be saved."""
    if isinstance(saved, dict):
        yield from saved.get("param_groups", ())
        for inner in saved.values():
            yield from _groups(inner)
