"""Train-inference corrections: weights from log π_old − log μ that compose with any φ.

They exist in behaviour mode `recompute`, where the ratio is π_θ/π_old and the gap π_old/μ between the training and the
rollout engine is left over. A token weight multiplies its token; a sequence weight enters **once**, whatever the
length. `apply: after_clip` multiplies φ by the weight; `before_clip` multiplies the ratio, so φ sees both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.registry import unknown

CORRECTIONS = ("tis", "icepop", "mis", "geometric", "veto")
APPLY = ("before_clip", "after_clip")
DEFAULT_BOUNDS = {"icepop": (0.5, 5.0), "mis": (0.5, 2.0), "geometric": (0.99, 1.01)}


@dataclass(frozen=True)
class CorrectionConfig:
    """`loss_fn.correction`. Raises UserError for values that mean nothing."""

    name: str
    """tis: min(w, cap). icepop: w where low ≤ w ≤ high, else the token is dropped. mis: drop the sequence whose product
    of weights is out of bounds. geometric: the same with the geometric mean. veto: only the veto below."""
    level: str = "token"
    """tis: token (one weight each) or sequence (the product, truncated, once). The others have one level."""
    cap: float = 2.0
    """tis: 2 in verl and slime, 3 in TRL."""
    low: float | None = None
    """Lower bound; None: icepop .5 (NeMo-RL), mis .5, geometric .99 (the last two are ours)."""
    high: float | None = None
    """Upper bound; None: icepop 5 (NeMo-RL), mis 2, geometric 1.01 (the last two are ours)."""
    veto_threshold: float | None = None
    """Drop a sequence that has any token with w below this (with any name); None never."""
    apply: str | None = None
    """before_clip or after_clip; None: after_clip, and inside W for VESPO."""

    def __post_init__(self) -> None:
        where = "loss_fn.correction"
        if self.name not in CORRECTIONS:
            raise unknown("correction", self.name, CORRECTIONS, where=f"{where}.name")
        if self.level not in ("token", "sequence"):
            raise unknown("level", self.level, ("token", "sequence"), where=f"{where}.level")
        if self.level == "sequence" and self.name != "tis":
            raise UserError(
                f"level: sequence means nothing to {self.name}",
                where=where,
                expected="level: sequence with tis only; mis and geometric judge sequences as they are",
            )
        if self.apply is not None and self.apply not in APPLY:
            raise unknown("order", self.apply, APPLY, where=f"{where}.apply")
        if self.name == "tis" and self.cap <= 0:
            raise UserError(f"is {self.cap}", where=f"{where}.cap", expected="a positive weight")
        if self.name == "veto" and self.veto_threshold is None:
            raise UserError("veto has no threshold", where=f"{where}.veto_threshold", expected="for example 1e-4")
        if self.name in DEFAULT_BOUNDS:
            low, high = self.bounds
            if not 0 <= low < high:
                raise UserError(f"bounds are {low} and {high}", where=where, expected="0 ≤ low < high")

    @classmethod
    def from_mapping(cls, mapping: dict | None) -> CorrectionConfig | None:
        """From the recipe's dictionary; empty or None is no correction."""
        if not mapping:
            return None
        known = [f.name for f in fields(cls)]
        for key in mapping:
            if key not in known:
                raise unknown("key", key, known, where="loss_fn.correction")
        if "name" not in mapping:
            raise UserError("has no name", where="loss_fn.correction", expected=f"one of {CORRECTIONS}")
        return cls(**mapping)

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) with the defaults of the name."""
        low, high = DEFAULT_BOUNDS.get(self.name, (0.0, float("inf")))
        return (low if self.low is None else self.low, high if self.high is None else self.high)


@dataclass(frozen=True)
class Weights:
    """What a correction does to tokens, or to sequences."""

    log_weight: Tensor | None = None
    """float: log of the weight, 0 where dropped; None: no weight."""
    keep: Tensor | None = None
    """bool: what is not dropped; None: everything."""


NO_WEIGHTS = Weights()


def token_weights(config: CorrectionConfig, log_weight: Tensor) -> Weights:
    """The per-token part: [tokens].

    Args:
        log_weight: [tokens], log π_old − log μ, 0 where masked.
    """
    if config.name == "tis" and config.level == "token":
        return Weights(log_weight.clamp(max=math.log(config.cap)))
    if config.name == "icepop":
        low, high = config.bounds
        weight = log_weight.exp()
        keep = (weight >= low) & (weight <= high)
        # A dropped token leaves S; the reference turns its weight 0 into log 1e-8, which empties the whole sequence.
        return Weights(torch.where(keep, log_weight, 0.0), keep)
    return NO_WEIGHTS


def sequence_weights(
    config: CorrectionConfig, log_weight_sum: Tensor, lengths: Tensor, vetoed_tokens: Tensor | None
) -> Weights:
    """The per-sequence part: [num_sequences].

    Args:
        log_weight_sum: [num_sequences], Σ_t (log π_old − log μ).
        lengths: [num_sequences], T.
        vetoed_tokens: [num_sequences], tokens with w < veto_threshold; None without one.
    """
    log_weight = keep = None
    if config.name == "tis" and config.level == "sequence":
        log_weight = log_weight_sum.clamp(max=math.log(config.cap))
    elif config.name in ("mis", "geometric"):
        low, high = config.bounds
        judged = log_weight_sum / lengths.clamp(min=1) if config.name == "geometric" else log_weight_sum
        weight = judged.exp()
        keep = (weight >= low) & (weight <= high)
    if vetoed_tokens is not None:
        keep = vetoed_tokens == 0 if keep is None else keep & (vetoed_tokens == 0)
    return Weights(log_weight, keep)
