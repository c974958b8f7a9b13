"""Top-entropy mask (arXiv 2506.01939): train on the tokens at which the policy was least sure, whatever φ is.

As in TRL's GRPO trainer (top_entropy_quantile): a token whose entropy is below the quantile of all tokens of the
mini-batch has no gradient, and still counts in what the loss is divided by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.ratios import Ratios
from vespo_megatron.losses.search import counted_tokens, on_call, to_find


@dataclass(frozen=True)
class EntropySearch:
    """The entropy that the highest `top_entropy_fraction` of tokens have."""

    top_entropy_fraction: float
    gathers: ClassVar = True
    finds: ClassVar[tuple[str, ...]] = ("entropy_min",)

    def contributions(self, ratios: Ratios) -> Tensor:
        """[1, tokens]: entropy."""
        return counted_tokens(ratios, [_entropy(ratios)])

    def found(self, contributions: Tensor) -> dict[str, Tensor]:
        """`entropy_min` []: the (1 − top_entropy_fraction) quantile, between two values by a straight line."""
        values = contributions[0].sort().values
        if not len(values):
            return {"entropy_min": values.new_zeros(())}
        place = (1 - self.top_entropy_fraction) * (len(values) - 1)
        below = int(place)
        above = min(below + 1, len(values) - 1)
        return {"entropy_min": torch.lerp(values[below], values[above], place - below)}


def entropy_search(given: Mapping[str, Any]) -> EntropySearch | None:
    """The search that these hyperparameters ask for; None without the mask, or where its bound is given."""
    return to_find(EntropySearch, given) if "top_entropy_fraction" in given else None


def high_entropy(ratios: Ratios, given: Mapping[str, Any]) -> Tensor | None:
    """bool [tokens]: what the mask keeps; None without it."""
    if "top_entropy_fraction" not in given:
        return None
    search = entropy_search(given)
    least = given["entropy_min"] if search is None else on_call(search, ratios)["entropy_min"]
    return _entropy(ratios).double() >= least


def _entropy(ratios: Ratios) -> Tensor:
    if ratios.entropy is None:
        raise UserError("is missing", where="entropy", expected="[tokens]: the top-entropy mask asks for it")
    return ratios.entropy
