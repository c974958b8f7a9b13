"""Top-entropy mask (arXiv 2506.01939): train on the tokens at which the policy was least sure, whatever φ is.

As in TRL's GRPO trainer (top_entropy_quantile): a token whose entropy is below the quantile of all tokens of the
mini-batch has no gradient, and still counts in what the loss is divided by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.ratios import Ratios
from vespo_megatron.losses.search import counted_tokens, gathered


@dataclass(frozen=True)
class EntropySearch:
    """The entropy that the highest `fraction` of tokens have."""

    fraction: float
    gathers = True

    @classmethod
    def from_hyperparameters(cls, given: Mapping[str, Any]) -> EntropySearch | None:
        """None without the mask, or where its bound is given."""
        return cls(given["top_entropy_fraction"]) if searches_entropy(given) else None

    def contributions(self, ratios: Ratios) -> Tensor:
        """[1, tokens]: entropy."""
        return counted_tokens(ratios, [_entropy(ratios)])

    def found(self, contributions: Tensor) -> dict[str, Tensor]:
        """`entropy_min` []: the (1 − fraction) quantile, between two values by a straight line."""
        values = contributions[0].sort().values
        if not len(values):
            return {"entropy_min": values.new_zeros(())}
        place = (1 - self.fraction) * (len(values) - 1)
        below = int(place)
        above = min(below + 1, len(values) - 1)
        return {"entropy_min": torch.lerp(values[below], values[above], place - below)}

    def on_call(self, ratios: Ratios) -> dict[str, Tensor]:
        """`found` of the tokens of this call, over context parallelism."""
        return self.found(gathered(self.contributions(ratios), ratios.sequences.group))


def searches_entropy(given: Mapping[str, Any]) -> bool:
    """Whether the bound of the mask is still to be found."""
    return "top_entropy_fraction" in given and given.get("entropy_min") is None


def high_entropy(ratios: Ratios, given: Mapping[str, Any]) -> Tensor | None:
    """bool [tokens]: what the mask keeps; None without it."""
    if "top_entropy_fraction" not in given:
        return None
    search = EntropySearch.from_hyperparameters(given)
    least = given["entropy_min"] if search is None else search.on_call(ratios)["entropy_min"]
    return _entropy(ratios).double() >= least


def _entropy(ratios: Ratios) -> Tensor:
    if ratios.entropy is None:
        raise UserError("is missing", where="entropy", expected="[tokens]: the top-entropy mask asks for it")
    return ratios.entropy
