"""Advantages from rewards, grouped by an explicit prompt id; groups may have different sizes and any order.

Pure, on the host, in float64: one number per response, computed once per rollout batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.one_line import OneLine
from vespo_megatron.losses.registry import unknown

EPSILON = 1e-6
"""Added to a standard deviation before dividing, as verl does."""


@dataclass(frozen=True, repr=False)
class Advantages(OneLine):
    """Advantages of a rollout batch."""

    values: Tensor
    """float64 [responses]; 0 where dropped."""
    keep: Tensor
    """bool [responses]: False for bad rewards, and for groups without signal where those are dropped."""
    metrics: dict[str, float]
    """advantage/* : mean, std, min, max over kept responses; counts of groups and of what was dropped."""


@dataclass(frozen=True)
class _Groups:
    rewards: Tensor
    index: Tensor
    """int64 [responses]: number of each response's group."""
    size: Tensor
    """float64 [groups]"""

    def mean(self, values: Tensor) -> Tensor:
        """float64 [responses]: the mean of each response's group."""
        return self.sum(values)[self.index] / self.size[self.index]

    def sum(self, values: Tensor) -> Tensor:
        """float64 [groups]"""
        return torch.zeros_like(self.size).index_add_(0, self.index, values)

    def std(self) -> Tensor:
        """float64 [responses]: the group's standard deviation with n − 1; 0 for a group of one."""
        square = self.sum((self.rewards - self.mean(self.rewards)) ** 2)
        return (square / (self.size - 1).clamp(min=1)).sqrt()[self.index]


def _group_mean(groups: _Groups) -> Tensor:
    """R − mean of the group (Dr.GRPO, arXiv 2503.20783)."""
    return groups.rewards - groups.mean(groups.rewards)


def _group_mean_std(groups: _Groups) -> Tensor:
    """(R − mean)/(std + ε) of the group (GRPO, arXiv 2402.03300)."""
    return _group_mean(groups) / (groups.std() + EPSILON)


def _leave_one_out(groups: _Groups) -> Tensor:
    """R − mean of the group's other responses (RLOO, arXiv 2402.14740); 0 for a group of one."""
    size = groups.size[groups.index]
    return torch.where(size > 1, _group_mean(groups) * size / (size - 1).clamp(min=1), 0.0)


def _leave_one_out_std(groups: _Groups) -> Tensor:
    """Leave-one-out baseline over (std + ε) of the group's *other* responses, as NeMo-RL has it.

    Where the others are all alike, or there is one, it is not divided (nemo_rl/algorithms/utils.py,
    calculate_baseline_and_std_per_prompt, and advantage_estimator.py): rewards 1, 0, 0, 0 give 1 and −.577.
    """
    others = (groups.size - 1)[groups.index]
    moved = _group_mean(groups)
    squares = groups.sum(moved**2)[groups.index]
    # Σ over the others of (R − their mean)²; what is left of equal rewards is rounding.
    spread = squares - moved**2 - moved**2 / others.clamp(min=1)
    variance = torch.where((others > 1) & (spread > 1e-12 * squares), spread, 0.0) / (others - 1).clamp(min=1)
    advantage = _leave_one_out(groups)
    return torch.where(variance > 0, advantage / (variance.sqrt() + EPSILON), advantage)


def _leave_one_out_group_std(groups: _Groups) -> Tensor:
    """Leave-one-out baseline over (std + ε) of the group."""
    return _leave_one_out(groups) / (groups.std() + EPSILON)


def _standardized(values: Tensor) -> Tensor:
    spread = values.std(correction=1) if len(values) > 1 else torch.zeros((), dtype=values.dtype)
    return (values - values.mean()) / (spread + EPSILON)


def _global(groups: _Groups) -> Tensor:
    """(R − batch mean)/(batch std + ε): REINFORCE++ (arXiv 2501.03262)."""
    return _standardized(groups.rewards)


def _global_baseline(groups: _Groups) -> Tensor:
    """(R − group mean), then normalised over the batch: REINFORCE++-baseline (arXiv 2501.03262)."""
    return _standardized(_group_mean(groups))


def _none(groups: _Groups) -> Tensor:
    """The reward itself."""
    return groups.rewards.clone()


ESTIMATORS: dict[str, Callable[[_Groups], Tensor]] = {
    "group_mean": _group_mean,
    "group_mean_std": _group_mean_std,
    "leave_one_out": _leave_one_out,
    "leave_one_out_std": _leave_one_out_std,
    "leave_one_out_group_std": _leave_one_out_group_std,
    "reinforce_plus_plus": _global,
    "reinforce_plus_plus_baseline": _global_baseline,
    "dr_grpo": _group_mean,
    "none": _none,
}


def resolve_estimator(name: str, *, normalize_rewards: bool, use_leave_one_out_baseline: bool) -> str:
    """The estimator `grpo.advantage_estimator` means: itself, or for `auto` what the two NeMo switches say.

    Raises:
        UserError: unknown name.
    """
    if name == "auto":
        base = "leave_one_out" if use_leave_one_out_baseline else "group_mean"
        return f"{base}_std" if normalize_rewards else base
    if name not in ESTIMATORS:
        raise unknown("estimator", name, [*ESTIMATORS, "auto"], where="grpo.advantage_estimator")
    return name


def compute_advantages(
    rewards: Sequence[float] | Tensor,
    group_ids: Sequence[Hashable],
    estimator: str = "group_mean_std",
    *,
    drop_groups_without_signal: bool = False,
    on_bad_sample: str = "error",
    sample_ids: Sequence[str] | None = None,
) -> Advantages:
    """Advantages of a rollout batch.

    Args:
        rewards: [responses].
        group_ids: [responses]; responses with the same id (of the prompt) form a group.
        estimator: a key of `ESTIMATORS`.
        drop_groups_without_signal: mark groups whose rewards are all equal as not kept (DAPO dynamic sampling).
        on_bad_sample: error or drop: what to do with a reward that is not finite. Dropped responses take no part in
            their group's statistics.
        sample_ids: names for errors; None: the place in the batch.

    Raises:
        UserError: lengths that differ, unknown estimator, a reward that is not finite (naming sample and group).
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64).clone()
    if rewards.dim() != 1 or len(group_ids) != len(rewards):
        raise UserError(
            f"{len(group_ids)} group ids for rewards of shape {tuple(rewards.shape)}",
            where="advantages",
            expected="one reward and one prompt id per response",
        )
    if estimator not in ESTIMATORS:
        raise unknown("estimator", estimator, ESTIMATORS, where="grpo.advantage_estimator")
    if on_bad_sample not in ("error", "drop"):
        raise unknown("on_bad_sample", on_bad_sample, ("error", "drop"), where="loss_fn.on_bad_sample")
    good = rewards.isfinite()
    if on_bad_sample == "error" and not good.all():
        bad = int((~good).nonzero()[0])
        raise UserError(
            f"reward is {float(rewards[bad])}: group {group_ids[bad]!r} has no advantages",
            where=f"sample {sample_ids[bad] if sample_ids is not None else bad}",
            expected="a finite reward",
            fix="look at the reward function; loss_fn.on_bad_sample=drop goes on without the sample",
        )
    numbers: dict[Hashable, int] = {}
    index = torch.tensor([numbers.setdefault(key, len(numbers)) for key in group_ids], dtype=torch.int64)
    values = torch.zeros_like(rewards)
    keep = good.clone()
    signal = torch.zeros(len(numbers), dtype=torch.bool)
    if good.any():
        size = torch.bincount(index[good], minlength=len(numbers)).double()
        groups = _Groups(rewards[good], index[good], size)
        lowest = torch.full((len(numbers),), torch.inf, dtype=torch.float64)
        lowest.scatter_reduce_(0, groups.index, groups.rewards, "amin")
        signal[groups.index[groups.rewards > lowest[groups.index]]] = True
        if drop_groups_without_signal:
            keep &= signal[index]
        values[good] = ESTIMATORS[estimator](groups)
        values = torch.where(keep, values, 0.0)
    kept = values[keep]
    metrics = {
        "advantage/bad_samples": float((~good).sum()),
        "advantage/groups": float(len(numbers)),
        "advantage/groups_without_signal": float((~signal).sum()),
        "advantage/dropped_samples": float((~keep).sum()),
    }
    return Advantages(values, keep, metrics | spread(kept))


def spread(advantages: Tensor) -> dict[str, float]:
    """Mean, standard deviation and extremes of the advantages that are trained on: float64 [kept responses]."""
    if not len(advantages):
        return {}
    return {
        "advantage/mean": float(advantages.mean()),
        "advantage/std": float(advantages.std(correction=0)),
        "advantage/min": float(advantages.min()),
        "advantage/max": float(advantages.max()),
    }
