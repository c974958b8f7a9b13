"""The values a hyperparameter may have: one row per name, which means the same in every objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.registry import Objective, unknown

LARGEST = 1e30
"""Of a finite number: one that float32 does not hold is a fault of PyTorch's, deep in a loss, not a bound."""
WHERE = "loss_fn.hyperparameters"


@dataclass(frozen=True)
class Number:
    """A number between two bounds; where `high` is infinity, that is a value too: what it bounds is off."""

    low: float = 0.0
    high: float = math.inf
    above: bool = False
    """Whether `low` itself is refused."""
    null: bool = False
    """Whether null is a value: the bound or the part that it sets is off."""
    tensor: bool = False
    """Whether a tensor of one number will do, whose value is not looked at."""

    def accepts(self, value: Any) -> bool:
        """Whether `value` is one of these."""
        if isinstance(value, Tensor):
            return self.tensor and value.numel() == 1
        if value is None:
            return self.null
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        number = float(value)
        inside = self.low < number <= self.high if self.above else self.low <= number <= self.high
        return inside and (abs(number) <= LARGEST or math.isinf(number))

    def __str__(self) -> str:
        low = f" above {self.low:g}" if self.above else f" of at least {self.low:g}"
        high = "" if self.high == math.inf else f" and at most {self.high:g}"
        return f"a number{'' if self.low == -math.inf else low}{high}" + (", or null" if self.null else "")


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def accepts(self, value: Any) -> bool:
        """Whether `value` is one of these."""
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        """Whether `value` is one of these."""
        return isinstance(value, str) and value in self.names

    def __str__(self) -> str:
        return "one of " + ", ".join(self.names)


COMMON: dict[str, Number | Flag | Choice] = {
    "opsm_delta": Number(null=True),
    "opsm_anchor": Choice(("behavior", "old")),
    "top_entropy_fraction": Number(high=1.0, above=True),
    "entropy_min": Number(-math.inf, null=True, tensor=True),
}
"""Hyperparameters that compose with every objective."""

FINITE = Number(high=LARGEST)
POSITIVE = Number(high=LARGEST, above=True)
ANY = Number(-math.inf)
FOUND = Number(-math.inf, null=True, tensor=True)
VALUES: dict[str, Number | Flag | Choice] = {
    **COMMON,
    # VESPO
    "c1_pos": FINITE,
    "c2_pos": FINITE,
    "c1_neg": FINITE,
    "c2_neg": FINITE,
    "normalization": Choice(("none", "sqrt", "linear")),
    # clips around 1; a lower one of 1 and an upper one of infinity are off
    "clip_low": Number(high=1.0),
    "clip_high": Number(),
    "dual_clip": Number(1.0, above=True, null=True),
    "log_ratio_max": Number(high=80.0, above=True, null=True),
    # bounds of ratios and of weights
    "ratio_min": FINITE,
    "ratio_max": Number(above=True, null=True),
    "tis_cap": Number(above=True, null=True),
    "behavior_weight_cap": Number(above=True, null=True),
    "length_normalized": Flag(),
    # DPPO
    "delta_low": Number(),
    "delta_high": Number(),
    # SAPO: τ of 0 would be no gate
    "tau_pos": POSITIVE,
    "tau_neg": POSITIVE,
    # MASPO: what is divided by keeps its square above float32's smallest number
    "sigma_base": Number(1e-6, LARGEST),
    "sigma_max": Number(1e-6, LARGEST),
    "alpha": FINITE,
    "beta_pos": FINITE,
    "beta_neg": FINITE,
    "risk_min": Number(1e-6, LARGEST),
    "risk_max": Number(1e-6, LARGEST),
    # BAPO: bounds on either side of 1, at most some thousands of which are tried
    "ratio_low": Number(high=1.0, null=True, tensor=True),
    "ratio_high": Number(1.0, null=True, tensor=True),
    "target_share": Number(high=1.0),
    "low_start": Number(high=1.0),
    "low_max": Number(high=1.0),
    "low_step": Number(1e-3, 1.0),
    "high_start": Number(1.0, 10.0),
    "high_max": Number(1.0, 10.0),
    "high_step": Number(1e-3, 10.0),
    # GMPO: clips of log ρ
    "log_clip_low": Number(),
    "log_clip_high": Number(),
    # OPMD and KL-Cov: what is divided by A
    "tau": Number(high=1e3),
    "kl_coefficient": Number(high=1e3),
    # CE-GPPO
    "beta_low": Number(high=1e3),
    "beta_high": Number(high=1e3),
    # M2PO, Clip-Cov, KL-Cov, and what is found of a whole mini-batch
    "m2_threshold": Number(above=True),
    "m2_max": Number(null=True, tensor=True),
    "share": Number(high=1.0),
    "cov_low": ANY,
    "cov_high": ANY,
    "mean_advantage": FOUND,
    "mean_log_prob": FOUND,
    "lot_max": FOUND,
    "cov_min": FOUND,
}
"""Of every hyperparameter of this library's objectives; those of a φ of the user's own may be anything."""

ORDERED = (
    ("ratio_min", "ratio_max"),
    ("sigma_base", "sigma_max"),
    ("risk_min", "risk_max"),
    ("low_start", "low_max"),
    ("high_start", "high_max"),
    ("cov_low", "cov_high"),
)
"""Pairs of which the first may not be above the second."""

TOGETHER = (
    ("ratio_low", "ratio_high"),
    ("mean_advantage", "mean_log_prob", "lot_max"),
    ("mean_advantage", "mean_log_prob", "cov_min"),
)
"""What is found of a mini-batch, all of it or nothing."""

NEEDED = {"entropy_min": "top_entropy_fraction", "opsm_anchor": "opsm_delta"}
"""Hyperparameter → the one without which it would say nothing."""


def check_hyperparameters(objective: Objective, given: Mapping[str, Any], where: str = WHERE) -> None:
    """Check names, then values, then what goes together and the order of those that bound a range.

    Raises:
        UserError: a name that neither `objective` nor every objective has, a value that means nothing, one that says
            nothing without another.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"is a {type(given).__name__}", where=where, expected="names and values, as in {clip_low: 0.2}")
    objective.check((name for name in given if name not in COMMON), where=where)
    rules = COMMON if objective.is_users_own else VALUES
    for name, value in given.items():
        rule = rules.get(name)
        if rule is None or rule.accepts(value):
            continue
        if isinstance(rule, Choice):
            raise unknown(name, str(value), rule.names, where=f"{where}.{name}")
        raise UserError(_fact(value), where=f"{where}.{name}", expected=str(rule))
    _check_needed(given, where)
    if not objective.is_users_own:
        _check_together(objective, given, where)
        _check_order({**objective.hyperparameters, **given}, given, where)


def _fact(value: Any) -> str:
    """What is wrong with a value, in a line: the value where it is a number, else its type."""
    if value is None:
        return "is null"
    if isinstance(value, str):
        return f"is the text {value!r}"
    plain = isinstance(value, bool | int | float)
    return f"is {value}" if plain else f"is a {type(value).__name__}"


def _check_needed(given: Mapping[str, Any], where: str) -> None:
    """Raise UserError for what would be ignored, since the part that it sets is not asked for."""
    for name, needed in NEEDED.items():
        if given.get(name) is not None and needed not in given:
            raise UserError(
                f"is given without {needed}, and would be ignored",
                where=f"{where}.{name}",
                expected=f"{needed} beside it, or neither",
            )


def _check_together(objective: Objective, given: Mapping[str, Any], where: str) -> None:
    """Raise UserError where some of what is found together is given, and some is not."""
    for names in TOGETHER:
        missing = [name for name in names if given.get(name) is None]
        if missing and len(missing) < len(names) and all(name in objective.hyperparameters for name in names):
            raise UserError(
                "is given without " + " and ".join(missing),
                where=f"{where}.{next(name for name in names if name not in missing)}",
                expected="all of " + ", ".join(names) + ", or none: they are found together",
            )


def _check_order(values: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """Raise UserError for two bounds the wrong way round, at the one that was given."""
    for first, second in ORDERED:
        low, high = values.get(first), values.get(second)
        if low is None or high is None or low <= high:
            continue
        name, other, side = (first, second, "at most") if first in given else (second, first, "at least")
        raise UserError(
            f"is {values[name]}, and {other} is {values[other]}",
            where=f"{where}.{name}",
            expected=f"{side} {other}: they are the two ends of one range",
        )
