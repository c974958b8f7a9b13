"""Learning rate scaled by the effective sample size: VCPO (arXiv 2602.17616), beside the loss, not in it."""

from __future__ import annotations

import math

from vespo_megatron.errors import UserError
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


def off_policy_baseline(weights: list[float], gradient_norms: list[float], rewards: list[float]) -> float:
    """VCPO's minimum-variance baseline b* = Σ w²·‖g‖²·R / Σ w²·‖g‖², over the trajectories of one group.

    Args:
        weights: W of each trajectory. gradient_norms: ‖∇ log π‖ of each. rewards: R of each.
    """
    importance = [w * w * g * g for w, g in zip(weights, gradient_norms, strict=True)]
    total = sum(importance)
    return sum(i * r for i, r in zip(importance, rewards, strict=True)) / total if total > 0 else 0.0
