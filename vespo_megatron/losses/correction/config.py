"""`loss_fn.correction`: a weight, rejections and a veto, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.losses.correction.rejection import Rejection, check_bounds
from vespo_megatron.losses.lazy import lazy
from vespo_megatron.losses.registry import unknown

DEFAULT_BOUNDS: dict[str, tuple[float, float]] = {"none": (0.0, 1.0), "tis": (0.0, 2.0), "icepop": (0.5, 5.0)}
DEFAULT_BOUNDS["mis"] = (0.5, 2.0)
"""tis: 2 in verl and slime, 3 in TRL. icepop: NeMo-RL's. mis: verl's and slime's."""
LEVELS = ("token", "sequence", "geometric")
DENOMINATORS = ("fixed", "kept")
APPLY = ("before_clip", "after_clip")
RENAMED = {
    "name": "weight (tis, icepop, mis); what was called mis is now reject=[{statistic: k1, level: sum, low, high}], "
    "geometric the same with level: mean",
    "cap": "high",
    "veto_threshold": "veto",
}


@dataclass(frozen=True)
class CorrectionConfig:
    """A weight **and** rejections on w = π_train/μ; every part may be left out but not all of them.

    Raises:
        UserError: values that mean nothing.
    """

    weight: str = "none"
    """none. tis: w truncated to the bounds. mis: w inside the bounds, else dropped. icepop: mis of tokens, with bounds
    of its own."""
    level: str = "token"
    """Of the weight. token: one w each. sequence: Πw of the response. geometric: (Πw)^(1/T). The last two enter once
    per response, never once per token."""
    low: float | None = None
    """Lower bound of the weight; None: `DEFAULT_BOUNDS`."""
    high: float | None = None
    """Upper bound of the weight; None: `DEFAULT_BOUNDS`. No weight is above e^20."""
    normalize: bool = False
    """Divide the weights by their mean over the mini-batch (verl's and slime's batch normalisation): over tokens at
    level token, over responses at the others, rejected ones included."""
    reject: tuple[Rejection, ...] = ()
    """Rules that all have to be passed; judged on w before it is bounded."""
    veto: float | None = None
    """Drop a response any token of which has w below this; None never."""
    denominator: str = "fixed"
    """fixed: the aggregation counts rejected tokens and responses as well. kept: only what is kept (verl, slime)."""
    apply: str | None = None
    """before_clip: the weight multiplies the ratio, so that φ sees both; after_clip: it multiplies φ. None: after_clip,
    and inside W for VESPO."""

    def __post_init__(self) -> None:
        where = "loss_fn.correction"
        for value, known, key in (
            (self.weight, DEFAULT_BOUNDS, "weight"),
            (self.level, LEVELS, "level"),
            (self.denominator, DENOMINATORS, "denominator"),
        ):
            if value not in known:
                raise unknown(key, str(value), known, where=f"{where}.{key}")
        if self.apply is not None and self.apply not in APPLY:
            raise unknown("order", self.apply, APPLY, where=f"{where}.apply")
        if self.weight == "icepop" and self.level != "token":
            raise UserError("icepop weighs tokens", where=f"{where}.level", expected="token, or weight: mis")
        if self.veto is not None:
            check_bounds(self.veto, None, f"{where}.veto")
        check_bounds(*self.bounds, where)
        if self.weight == "none":
            self._check_without_weight(where)

    def _check_without_weight(self, where: str) -> None:
        for key, given in (
            ("low", self.low is not None),
            ("high", self.high is not None),
            ("level", self.level != "token"),
            ("normalize", self.normalize),
            ("apply", self.apply is not None),
        ):
            if given:
                raise UserError(
                    "is of a weight, and there is none",
                    where=f"{where}.{key}",
                    expected="weight: tis, mis or icepop beside it",
                    fix="bounds of a rejection are in reject=[{statistic: k1, level: mean, low: …, high: …}]",
                )
        if not self.rules:
            raise UserError("neither weighs nor rejects", where=where, expected="weight, reject or veto")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | None) -> CorrectionConfig | None:
        """From the recipe's dictionary; empty or None is no correction."""
        if not mapping:
            return None
        for key in mapping:
            if key in RENAMED:
                raise UserError(
                    f"has no key {key!r} any more", where="loss_fn.correction", expected=f"it is called {RENAMED[key]}"
                )
            if key not in cls.__dataclass_fields__:
                raise unknown("key", key, cls.__dataclass_fields__, where="loss_fn.correction")
        rules = mapping.get("reject") or ()
        if isinstance(rules, Mapping):
            rules = (rules,)
        made = (rule if isinstance(rule, Rejection) else Rejection.from_mapping(rule) for rule in rules)
        weight = mapping.get("weight") or "none"
        return cls(**{**mapping, "reject": tuple(made), "weight": weight})

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) of the weight, with the defaults of its name."""
        low, high = DEFAULT_BOUNDS[self.weight]
        return (low if self.low is None else self.low, high if self.high is None else self.high)

    @property
    def weighs(self) -> bool:
        """Whether there is a weight."""
        return self.weight != "none"

    @lazy
    def rules(self) -> tuple[Rejection, ...]:
        """Every rejection, the veto as one of them."""
        veto = () if self.veto is None else (Rejection("k1", "max", low=self.veto),)
        return (*self.reject, *veto)

    @property
    def needs_mini_batch(self) -> bool:
        """Whether something is counted over the whole mini-batch before its first micro-batch is computed."""
        return self.normalize or self.denominator == "kept"
