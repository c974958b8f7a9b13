"""VCPO (arXiv 2602.17616), beside the loss, not in it: a learning rate by effective sample size, and a baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vespo_megatron.errors import UserError
from vespo_megatron.losses.advantage_estimators import EPSILON
from vespo_megatron.losses.registry import unknown

RULES = ("none", "sqrt", "linear")


def learning_rate_scale(ess_fraction: float, rule: str = "none", rho_base: float = 1.0) -> float:
    """Factor on the learning rate, in (0, 1].

    Args:
        ess_fraction: ESS/B of the mini-batch from *unclipped* W: the metric `vespo/ess`.
        rule: none: 1. sqrt: √min(1, ess_fraction/rho_base). linear: min(1, ess_fraction/rho_base).
        rho_base: the fraction at which nothing is scaled; 1.0, or .55 for multi-turn in the paper.

    Raises:
        UserError: unknown rule, rho_base outside (0, 1].
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES, where="ESS-scaled learning rate")
    if not 0 < rho_base <= 1:
        raise UserError(f"is {rho_base}", where="ESS-scaled learning rate: rho_base", expected="in (0, 1]")
    if rule == "none" or not math.isfinite(ess_fraction):
        return 1.0
    scale = min(1.0, max(ess_fraction, 0.0) / rho_base)
    return math.sqrt(scale) if rule == "sqrt" else scale


def off_policy_baseline(weights: Sequence[float], gradient_norms: Sequence[float], rewards: Sequence[float]) -> float:
    """VCPO's minimum-variance baseline b* = Σ w²·‖g‖²·R / Σ w²·‖g‖², over the trajectories of one group.

    Args:
        weights: W of each trajectory; their scale does not matter.
        gradient_norms: ‖∇ log π‖ of each.
        rewards: R of each.
    """
    importance = [w * w * g * g for w, g in zip(weights, gradient_norms, strict=True)]
    total = sum(importance)
    return sum(i * r for i, r in zip(importance, rewards, strict=True)) / total if total > 0 else 0.0


@dataclass(frozen=True)
class ResponseFacts:
    """What the baseline needs of one response."""

    sample_id: str
    prompt_id: str
    """Responses with the same one form a group."""
    reward: float
    is_trained: bool
    """False where it has no token in the loss, or was given no advantage for being truncated."""
    log_weight: float
    """Σ log π_θ/μ."""
    gradient_norm: float
    """‖∇ log π_θ‖ of the whole response."""


def off_policy_advantages(responses: Sequence[ResponseFacts], *, normalize: bool) -> dict[str, float]:
    """Sample id → R − b* of its group (prompt id); 0 for what is not trained on.

    Args:
        responses: those that are not trained on, or whose W or norm is not finite, are not in b*.
        normalize: divide by the group's standard deviation (n − 1, + 1e-6), as GRPO does.
    """
    groups: dict[str, list[ResponseFacts]] = {}
    for response in responses:
        groups.setdefault(response.prompt_id, []).append(response)
    advantages = {}
    for members in groups.values():
        counted = [
            one
            for one in members
            if one.is_trained and math.isfinite(one.log_weight) and math.isfinite(one.gradient_norm)
        ]
        largest = max((one.log_weight for one in counted), default=0.0)
        baseline = off_policy_baseline(
            [math.exp(one.log_weight - largest) for one in counted],
            [one.gradient_norm for one in counted],
            [one.reward for one in counted],
        )
        spread = statistics.stdev([one.reward for one in counted]) if len(counted) > 1 else 0.0
        scale = spread + EPSILON if normalize and spread > 0 else 1.0
        for one in members:
            advantages[one.sample_id] = (one.reward - baseline) / scale if one.is_trained else 0.0
    return advantages
