"""Advantage estimators: from the rewards of a rollout batch to one advantage per response, each with its source.

An estimator sees `RewardGroups`: responses that take part in baselines, those that are trained on marked among them.
Statistics of a group are over all it sees, statistics of the batch over what is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.registry import unknown

EPSILON = 1e-6
"""Added to a standard deviation before dividing, as verl and NeMo-RL do."""
VARIANCE_FLOOR = 1e-8
"""Least variance that advantages whitened over tokens are divided by (NeMo-RL)."""


@dataclass(frozen=True)
class RewardGroups:
    """Rewards of N responses in G groups."""

    rewards: Tensor
    """float64 [N]"""
    index: Tensor
    """int64 [N]: number of each response's group."""
    size: Tensor
    """float64 [G]"""
    trained: Tensor
    """bool [N]: what is trained on; the others are in baselines alone."""
    lengths: Tensor | None = None
    """float64 [N]: response tokens."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Part of the reward → float64 [N]."""
    part_weights: Mapping[str, float] = field(default_factory=dict)
    """Part → its weight, for `gdpo`."""
    part_estimator: str = "group_mean_std"
    """What `gdpo` makes of each part."""
    pass_at_k: int = 1
    """k of `pass_at_k`."""

    def mean(self, values: Tensor) -> Tensor:
        """float64 [N]: the mean of each response's group."""
        return self.sum(values)[self.index] / self.size[self.index]

    def sum(self, values: Tensor) -> Tensor:
        """float64 [G]"""
        return torch.zeros_like(self.size).index_add_(0, self.index, values)

    def std(self) -> Tensor:
        """float64 [N]: the group's standard deviation with n − 1; 0 for a group of one."""
        square = self.sum((self.rewards - self.mean(self.rewards)) ** 2)
        return (square / (self.size - 1).clamp(min=1)).sqrt()[self.index]

    def differ(self) -> Tensor:
        """bool [G]: whether the group's rewards are not all equal."""
        return self._distinct()[0] > 1

    def std_of_others(self) -> Tensor:
        """float64 [N]: standard deviation, with n − 1, of the group's other rewards; 0 where those are all equal."""
        size = self.size[self.index]
        centred = self.rewards - self.mean(self.rewards)
        square = self.sum(centred**2)[self.index] - centred**2 * size / (size - 1).clamp(min=1)
        distinct, alike = self._distinct()
        distinct = distinct[self.index]
        # Decided by the rewards themselves: what rounding leaves of a square of 0 would be divided by.
        all_equal = (distinct == 1) | ((distinct == 2) & (alike == 1))
        return torch.where(all_equal, 0.0, (square.clamp(min=0) / (size - 2).clamp(min=1)).sqrt())

    def _distinct(self) -> tuple[Tensor, Tensor]:
        """int64 [G], different rewards of each group; int64 [N], responses of the group with each one's reward."""
        pairs = torch.stack([self.index.double(), self.rewards + 0.0], dim=1)  # −0 becomes 0
        values, inverse, counts = torch.unique(pairs, dim=0, return_inverse=True, return_counts=True)
        return torch.bincount(values[:, 0].long(), minlength=len(self.size)), counts[inverse]


def _group_mean(groups: RewardGroups) -> Tensor:
    """R − mean of the group (Dr.GRPO, arXiv 2503.20783)."""
    return groups.rewards - groups.mean(groups.rewards)


def _group_mean_std(groups: RewardGroups) -> Tensor:
    """(R − mean)/(std + ε) of the group (GRPO, arXiv 2402.03300)."""
    return _group_mean(groups) / (groups.std() + EPSILON)


def _leave_one_out(groups: RewardGroups) -> Tensor:
    """R − mean of the group's other responses (RLOO, arXiv 2402.14740); 0 for a group of one."""
    size = groups.size[groups.index]
    return torch.where(size > 1, _group_mean(groups) * size / (size - 1).clamp(min=1), 0.0)


def _leave_one_out_group_std(groups: RewardGroups) -> Tensor:
    """Leave-one-out baseline over (std + ε) of the whole group."""
    return _leave_one_out(groups) / (groups.std() + EPSILON)


def _leave_one_out_std(groups: RewardGroups) -> Tensor:
    """Leave-one-out baseline over (std + ε) of the *other* responses; not divided where those are all equal.

    Source: NeMo-RL, nemo_rl/algorithms/utils.py, `calculate_baseline_and_std_per_prompt`, and
    advantage_estimator.py, `GRPOAdvantageEstimator`.
    """
    spread = groups.std_of_others()
    return _leave_one_out(groups) / torch.where(spread > 0, spread + EPSILON, 1.0)


def _optimal_baseline(groups: RewardGroups) -> Tensor:
    """R − Σ T·R / ΣT of the group, T the response's tokens (OPO, arXiv 2505.23585; read in verl's `opo`)."""
    lengths = _lengths(groups, "opo")
    baseline = groups.sum(lengths * groups.rewards) / groups.sum(lengths).clamp(min=1)
    return groups.rewards - baseline[groups.index]


def _pass_at_k(groups: RewardGroups) -> Tensor:
    """Advantages of pass@k for right and wrong answers, in closed form (arXiv 2508.10751).

    With c right of n: ρ = 1 − C(n−c, k)/C(n, k), σ = √(ρ(1−ρ)); right (1 − ρ)/(σ + ε), wrong
    (1 − ρ − C(n−c−1, k−1)/C(n−1, k−1))/(σ + ε). A group of fewer than k takes its own size for k.
    Source: RUCAIBox/Passk_Training, code/passk_adv.py.
    """
    right = groups.rewards == 1
    if not (right | (groups.rewards == 0)).all():
        other = groups.rewards[~(right | (groups.rewards == 0))][0]
        raise UserError(
            f"pass_at_k was given a reward of {float(other):g}",
            where="grpo.advantage_estimator",
            expected="rewards of 0 and 1",
            fix="use a reward that is right or wrong, and no grpo.reward_shaping",
        )
    table = []
    for size, count in zip(groups.size.long().tolist(), groups.sum(right.double()).long().tolist(), strict=True):
        k = min(groups.pass_at_k, size)
        if k == 0:  # a group of which nothing is left
            table.append((0.0, 0.0))
            continue
        rho = 1 - math.comb(size - count, k) / math.comb(size, k)
        sigma = math.sqrt(rho * (1 - rho)) + EPSILON
        fails = math.comb(size - count - 1, k - 1) / math.comb(size - 1, k - 1) if count < size else 0.0
        table.append(((1 - rho) / sigma, (1 - rho - fails) / sigma))
    per_group = torch.tensor(table, dtype=torch.float64)[groups.index]
    return torch.where(right, per_group[:, 0], per_group[:, 1])


def _decoupled(groups: RewardGroups) -> Tensor:
    """Σ w·A of the reward's parts, each normalised in its group, then over the batch (GDPO, arXiv 2601.05242).

    The last division is by the batch's standard deviation alone, as in NeMo-RL's `GDPOAdvantageEstimator`.
    """
    total = torch.zeros_like(groups.rewards)
    for name, weight in groups.part_weights.items():
        if name not in groups.parts:
            raise unknown("part of the reward", name, groups.parts, where="grpo.reward_part_weights")
        part = replace(groups, rewards=groups.parts[name])
        advantage = ESTIMATORS[groups.part_estimator](part)
        total += weight * torch.where(part.differ()[groups.index], advantage, 0.0)
    trained = total[groups.trained]
    spread = trained.std(correction=1) if len(trained) > 1 else torch.zeros((), dtype=total.dtype)
    centred = total - (trained.mean() if len(trained) else 0.0)
    return centred / spread if spread > 0 else centred


def _standardized(values: Tensor, trained: Tensor) -> Tensor:
    kept = values[trained]
    spread = kept.std(correction=1) if len(kept) > 1 else torch.zeros((), dtype=values.dtype)
    return (values - (kept.mean() if len(kept) else 0.0)) / (spread + EPSILON)


def _whitened(values: Tensor, groups: RewardGroups, name: str) -> Tensor:
    """Over tokens, as NeMo-RL's `ReinforcePlusPlusAdvantageEstimator` does: every response counts with its length."""
    tokens = torch.where(groups.trained, _lengths(groups, name), 0.0)
    count = tokens.sum().clamp(min=1)
    centred = values - (values * tokens).sum() / count
    return centred / ((centred**2 * tokens).sum() / count).clamp(min=VARIANCE_FLOOR).sqrt()


def _global(groups: RewardGroups) -> Tensor:
    """(R − batch mean)/(batch std + ε): REINFORCE++ (arXiv 2501.03262), every response with the same weight."""
    return _standardized(groups.rewards, groups.trained)


def _global_tokens(groups: RewardGroups) -> Tensor:
    """REINFORCE++ whitened over tokens, as NeMo-RL and, but for N − 1, verl do."""
    return _whitened(groups.rewards, groups, "reinforce_plus_plus_tokens")


def _global_baseline(groups: RewardGroups) -> Tensor:
    """(R − group mean), then normalised over the batch: REINFORCE++-baseline (arXiv 2501.03262)."""
    return _standardized(_group_mean(groups), groups.trained)


def _global_baseline_tokens(groups: RewardGroups) -> Tensor:
    """REINFORCE++-baseline whitened over tokens, as NeMo-RL and, but for N − 1, verl do."""
    return _whitened(_group_mean(groups), groups, "reinforce_plus_plus_baseline_tokens")


def _none(groups: RewardGroups) -> Tensor:
    """The reward itself."""
    return groups.rewards.clone()


def _lengths(groups: RewardGroups, name: str) -> Tensor:
    if groups.lengths is None:
        raise UserError(f"{name} weighs responses by their length", where="lengths", expected="one per response")
    return groups.lengths


ESTIMATORS: dict[str, Callable[[RewardGroups], Tensor]] = {
    "group_mean": _group_mean,
    "group_mean_std": _group_mean_std,
    "leave_one_out": _leave_one_out,
    "leave_one_out_std": _leave_one_out_std,
    "leave_one_out_group_std": _leave_one_out_group_std,
    "opo": _optimal_baseline,
    "pass_at_k": _pass_at_k,
    "gdpo": _decoupled,
    "reinforce_plus_plus": _global,
    "reinforce_plus_plus_tokens": _global_tokens,
    "reinforce_plus_plus_baseline": _global_baseline,
    "reinforce_plus_plus_baseline_tokens": _global_baseline_tokens,
    "dr_grpo": _group_mean,
    "none": _none,
}


def resolve_estimator(name: str, *, normalize_rewards: bool, use_leave_one_out_baseline: bool) -> str:
    """The estimator `grpo.advantage_estimator` means: itself, or for `auto` what NeMo-RL's two switches say there.

    Raises:
        UserError: unknown name.
    """
    if name == "auto":
        if use_leave_one_out_baseline:
            return "leave_one_out_std" if normalize_rewards else "leave_one_out"
        return "group_mean_std" if normalize_rewards else "group_mean"
    if name not in ESTIMATORS:
        raise unknown("estimator", name, [*ESTIMATORS, "auto"], where="grpo.advantage_estimator")
    return name
