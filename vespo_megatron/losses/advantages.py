"""Advantages from rewards, grouped by an explicit prompt id; groups may have different sizes and any order.

Pure, on the host, in float64: one number per response, computed once per rollout batch. The formulas are in
`advantage_estimators`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.advantage_estimators import ESTIMATORS, RewardGroups
from vespo_megatron.losses.one_line import OneLine
from vespo_megatron.losses.registry import unknown

OVERLONG = ("off", "drop", "zero_advantage")
"""What becomes of truncated responses."""


@dataclass(frozen=True, repr=False)
class Advantages(OneLine):
    """Advantages of a rollout batch."""

    values: Tensor
    """float64 [responses]; 0 where dropped or not trained on."""
    keep: Tensor
    """bool [responses]: False for bad rewards, and for groups without signal where those are dropped."""
    trained: Tensor
    """bool [responses]: kept, and not filtered for being truncated."""
    masked: Tensor
    """bool [responses]: kept, but to have no token in the loss: truncated, with `overlong` drop."""
    metrics: dict[str, float]
    """advantage/* : mean, std, min, max over responses that are trained on; counts of groups and of what is not."""


@dataclass(frozen=True, repr=False)
class AdvantageOptions(OneLine):
    """How advantages are made of rewards, once for a run."""

    estimator: str = "group_mean_std"
    """A key of `ESTIMATORS`."""
    drop_groups_without_signal: bool = False
    """Mark groups whose rewards are all equal as not kept (DAPO dynamic sampling)."""
    on_bad_sample: str = "error"
    """error or drop: what to do with a reward that is not finite. Dropped responses are in no statistics."""
    overlong: str = "off"
    """drop: truncated responses leave the loss, its denominator too. zero_advantage: they stay in the denominator."""
    overlong_in_baseline: bool = True
    """Whether truncated responses, filtered in either way, count in their group's statistics."""
    pass_at_k: int = 1
    part_weights: Mapping[str, float] | None = None
    """Part of the reward → weight, for gdpo."""
    part_estimator: str = "group_mean_std"
    """What gdpo makes of each part."""
    clip_low: float | None = None
    clip_high: float | None = None
    """Bounds of the advantages, after everything else."""

    def __post_init__(self) -> None:
        for kind, value, known, where in (
            ("estimator", self.estimator, tuple(ESTIMATORS), "grpo.advantage_estimator"),
            ("on_bad_sample", self.on_bad_sample, ("error", "drop"), "loss_fn.on_bad_sample"),
            ("overlong filtering", self.overlong, OVERLONG, "grpo.overlong_filtering"),
        ):
            if value not in known:
                raise unknown(kind, value, known, where=where)
        if self.estimator == "gdpo" and len(self.part_weights or {}) < 2:
            raise UserError(
                f"gdpo was given {len(self.part_weights or {})} parts of the reward",
                where="grpo.advantage_estimator",
                expected="two or more, each with its weight",
                fix="name several rewards in env.rewards, or the parts of one in grpo.reward_part_weights",
            )
        if self.clip_low is not None and self.clip_high is not None and self.clip_low > self.clip_high:
            raise UserError(
                f"is {self.clip_low}, above grpo.advantage_clip_high={self.clip_high}", where="grpo.advantage_clip_low"
            )


def compute_advantages(
    rewards: Sequence[float] | Tensor,
    group_ids: Sequence[Hashable],
    estimator: str = "group_mean_std",
    *,
    options: AdvantageOptions | None = None,
    lengths: Sequence[int] | None = None,
    truncated: Sequence[bool] | None = None,
    parts: Mapping[str, Sequence[float]] | None = None,
    signal_rewards: Sequence[float] | None = None,
    sample_ids: Sequence[str] | None = None,
    **settings: Any,
) -> Advantages:
    """Advantages of a rollout batch.

    Args:
        rewards: [responses].
        group_ids: [responses]; responses with the same id (of the prompt) form a group.
        estimator: a key of `ESTIMATORS`.
        options: everything that can be said of it; then `estimator` and `settings` are not looked at.
        lengths: [responses] tokens; needed where responses are weighed by them.
        truncated: [responses], whether each was cut off at its limit; None: none was.
        parts: part of the reward → [responses].
        signal_rewards: [responses], by which groups without signal are told; None: `rewards`.
        sample_ids: names for errors; None: the place in the batch.
        settings: fields of `AdvantageOptions`, where there are no `options`.

    Raises:
        UserError: lengths that differ, unknown estimator, a reward that is not finite (naming sample and group).
    """
    options = options or AdvantageOptions(estimator, **settings)
    reward = torch.as_tensor(rewards, dtype=torch.float64).clone()
    if reward.dim() != 1 or len(group_ids) != len(reward):
        raise UserError(
            f"{len(group_ids)} group ids for rewards of shape {tuple(reward.shape)}",
            where="advantages",
            expected="one reward and one prompt id per response",
        )
    good = _good(reward, options, group_ids, sample_ids)
    cut = torch.zeros(len(reward), dtype=torch.bool) if truncated is None else torch.tensor(truncated, dtype=torch.bool)
    filtered = cut & (options.overlong != "off")
    numbers: dict[Hashable, int] = {}
    index = torch.tensor([numbers.setdefault(key, len(numbers)) for key in group_ids], dtype=torch.int64)
    counted = good if options.overlong_in_baseline else good & ~filtered
    trained = good & ~filtered

    def groups(values: Tensor) -> RewardGroups:
        return RewardGroups(
            rewards=values[counted],
            index=index[counted],
            size=torch.bincount(index[counted], minlength=len(numbers)).double(),
            trained=trained[counted],
            lengths=None if lengths is None else torch.tensor(lengths, dtype=torch.float64)[counted],
            parts={name: torch.tensor(part, dtype=torch.float64)[counted] for name, part in (parts or {}).items()},
            part_weights=options.part_weights or {},
            part_estimator=options.part_estimator,
            pass_at_k=options.pass_at_k,
        )

    judged = reward if signal_rewards is None else torch.as_tensor(signal_rewards, dtype=torch.float64)
    signal = groups(judged).differ() & (torch.bincount(index[trained], minlength=len(numbers)) > 0)
    keep = good & signal[index] if options.drop_groups_without_signal else good
    values = torch.zeros_like(reward)
    if counted.any():
        values[counted] = ESTIMATORS[options.estimator](groups(reward))
    if options.clip_low is not None or options.clip_high is not None:
        values = values.clamp(options.clip_low, options.clip_high)
    trained &= keep
    values = torch.where(trained, values, 0.0)
    metrics = {
        "advantage/bad_samples": float((~good).sum()),
        "advantage/groups": float(len(numbers)),
        "advantage/groups_without_signal": float((~signal).sum()),
        "advantage/dropped_samples": float((~keep).sum()),
        "advantage/filtered_samples": float((keep & ~trained).sum()),
    }
    masked = keep & ~trained if options.overlong == "drop" else torch.zeros_like(keep)
    return Advantages(values, keep, trained, masked, metrics | spread(values[trained]))


def _good(
    reward: Tensor, options: AdvantageOptions, group_ids: Sequence[Hashable], sample_ids: Sequence[str] | None
) -> Tensor:
    """bool [responses]: rewards that are finite; under `on_bad_sample: error` all are, or this raises."""
    good = reward.isfinite()
    if options.on_bad_sample == "error" and not good.all():
        bad = int((~good).nonzero()[0])
        raise UserError(
            f"reward is {float(reward[bad])}: group {group_ids[bad]!r} has no advantages",
            where=f"sample {sample_ids[bad] if sample_ids is not None else bad}",
            expected="a finite reward",
            fix="look at the reward function; loss_fn.on_bad_sample=drop goes on without the sample",
        )
    return good


def spread(advantages: Tensor) -> dict[str, float]:
    """Mean, standard deviation and extremes of the advantages that are trained on: float64 [responses]."""
    if not len(advantages):
        return {}
    return {
        "advantage/mean": float(advantages.mean()),
        "advantage/std": float(advantages.std(correction=0)),
        "advantage/min": float(advantages.min()),
        "advantage/max": float(advantages.max()),
    }
