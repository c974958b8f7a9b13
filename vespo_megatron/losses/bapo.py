"""Search for BAPO's two clip bounds (arXiv 2510.18927), over a micro-batch or a whole mini-batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vespo_megatron.losses.ratios import Ratios


@dataclass(frozen=True)
class BoundSearch:
    """How the bounds are searched for: the lower one rises to its maximum first, then the upper one.

    Sum `contributions` over everything the bounds are to hold for, then call `found`.
    """

    target_share: float = 0.5
    """The search stops where positives carry this share of the policy loss."""
    low_start: float = 0.6
    low_max: float = 0.9
    low_step: float = 0.05
    high_start: float = 1.2
    high_max: float = 3.0
    high_step: float = 0.05

    gathers: ClassVar = False
    finds: ClassVar[tuple[str, ...]] = ("ratio_low", "ratio_high")

    @property
    def lows(self) -> list[float]:
        """The values the lower bound may take, rising."""
        return candidates(self.low_start, self.low_max, self.low_step)

    @property
    def highs(self) -> list[float]:
        """The values the upper bound may take, rising."""
        return candidates(self.high_start, self.high_max, self.high_step)

    def contributions(self, ratios: Ratios) -> Tensor:
        """This rank's |policy loss| of positives under each upper bound, then of negatives under each lower bound.

        Returns:
            [len(highs) + len(lows)], additive over ranks and micro-batches.
        """
        ratio = ratios.counted(ratios.log_ratio).exp()
        advantage = ratios.counted(ratios.token_advantage)
        positive, negative = advantage.clamp(min=0), (-advantage).clamp(min=0)
        sums = [(ratio.clamp(max=high) * positive).sum() for high in self.highs]
        sums += [(ratio.clamp(min=low) * negative).sum() for low in self.lows]
        return torch.stack(sums)

    def found(self, contributions: Tensor) -> dict[str, Tensor]:
        """The first bounds that reach `target_share`, else the last: `ratio_low`, `ratio_high` [], no host wait.

        Args:
            contributions: summed over everything the bounds are to hold for.
        """
        lows, highs = self.lows, self.highs
        positive, negative = contributions[: len(highs)], contributions[len(highs) :]
        tried = torch.cat([positive[:1].expand(len(lows)), positive[1:]])
        against = torch.cat([negative, negative[-1:].expand(len(highs) - 1)])
        reached = tried >= self.target_share * (tried + against)
        reached[-1] = True
        first = reached.to(torch.int8).argmax().reshape(1)
        low_of = contributions.new_tensor(lows + [lows[-1]] * (len(highs) - 1))
        high_of = contributions.new_tensor([highs[0]] * len(lows) + highs[1:])
        return {"ratio_low": low_of.gather(0, first)[0], "ratio_high": high_of.gather(0, first)[0]}


def candidates(start: float, stop: float, step: float) -> list[float]:
    """start, start + step, … and stop."""
    if step <= 0:
        return [start]
    count = max(math.ceil((stop - start) / step - 1e-9), 0)
    return [start + step * i for i in range(count)] + [max(stop, start)]
