"""Rejection of tokens and responses by how far w = π_train/μ is from one.

A rule is a statistic of the token log-ratios d = log w, a level at which it is judged, and two bounds. What is rejected
has no gradient; what is kept has weight 1 from here (`weights` weighs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.registry import unknown

STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(d) - d,
}
"""Per token, of d = log w. Bounds of k1 are bounds of the *ratio*: of w, Πw or its geometric mean."""
LEVELS = ("token", "sum", "mean", "max")


@dataclass(frozen=True)
class Rejection:
    """One rule; raises UserError for values that mean nothing."""

    statistic: str = "k1"
    """k1: d itself, judged as a ratio. k2: d²/2. k3: e^d − 1 − d."""
    level: str = "mean"
    """token: drops the tokens outside. sum, mean: drops the response whose sum or mean over its tokens is outside (of
    k1: Πw, or the geometric mean of w). max: drops the response any token of which is outside."""
    low: float | None = None
    """None: no lower bound."""
    high: float | None = None
    """None: no upper bound."""

    def __post_init__(self) -> None:
        where = "loss_fn.correction.reject"
        for value, known, key in ((self.statistic, STATISTICS, "statistic"), (self.level, LEVELS, "level")):
            if value not in known:
                raise unknown(key, value, known, where=f"{where}.{key}")
        if self.low is None and self.high is None:
            raise UserError("a rule has no bound", where=where, expected="low, high, or both")
        check_bounds(self.low, self.high, where)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Rejection:
        """From one entry of the recipe's `loss_fn.correction.reject`."""
        for key in mapping:
            if key not in cls.__dataclass_fields__:
                raise unknown("key", key, cls.__dataclass_fields__, where="loss_fn.correction.reject")
        return cls(**mapping)

    def outside(self, values: Tensor) -> Tensor:
        """bool: where the statistic (of k1: its logarithm) is out of bounds; shape as given."""
        judged = values.exp() if self.statistic == "k1" else values
        low = 0.0 if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return (judged < low) | (judged > high)

    def keeps_tokens(self, log_weight: Tensor) -> Tensor:
        """bool [tokens]: where a token is inside; `log_weight [tokens]` is d, 0 where masked."""
        return ~self.outside(STATISTICS[self.statistic](log_weight))

    def summed(self, log_weight: Tensor) -> Tensor:
        """[tokens]: what is summed over the response to judge it, of a rule above token level.

        Args:
            log_weight: [tokens], d, 0 where masked.
        """
        if self.level == "max":
            return (~self.keeps_tokens(log_weight)).to(log_weight.dtype)
        return STATISTICS[self.statistic](log_weight)

    def keeps_sequences(self, total: Tensor, lengths: Tensor) -> Tensor:
        """bool [num_sequences]: from the sums of `summed` over whole responses, [num_sequences]."""
        if self.level == "max":
            return total == 0
        return ~self.outside(total / lengths.clamp(min=1) if self.level == "mean" else total)


def kept_tokens(rules: Sequence[Rejection], log_weight: Tensor) -> Tensor | None:
    """bool [tokens]: where every rule of tokens is passed; None without one.

    Args:
        log_weight: [tokens], d = log π_train − log μ, 0 where masked.
    """
    passed = [rule.keeps_tokens(log_weight) for rule in rules if rule.level == "token"]
    return reduce(torch.logical_and, passed) if passed else None


def kept_sequences(rules: Sequence[Rejection], judged: Sequence[Tensor], lengths: Tensor) -> Tensor | None:
    """bool [num_sequences]: where every rule of responses is passed; None without one.

    Args:
        judged: [num_sequences] for each rule of responses, in order: the sums of `Rejection.summed`.
        lengths: [num_sequences], T.
    """
    of_sequences = [rule for rule in rules if rule.level != "token"]
    passed = [rule.keeps_sequences(total, lengths) for rule, total in zip(of_sequences, judged, strict=True)]
    return reduce(torch.logical_and, passed) if passed else None


def check_bounds(low: float | None, high: float | None, where: str) -> None:
    """Raise UserError unless 0 ≤ low < high, of those that are given, and neither is NaN."""
    for key, bound in (("low", low), ("high", high)):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float) or not bound >= 0):
            raise UserError(f"is {bound!r}", where=f"{where}.{key}", expected="a number of at least 0, or null")
    if not (0.0 if low is None else low) < (math.inf if high is None else high):
        raise UserError(f"bounds are {low} and {high}", where=where, expected="0 ≤ low < high")
