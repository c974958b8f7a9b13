"""Searches of Clip-Cov and KL-Cov (arXiv 2505.22617): which tokens have a high covariance of advantage and log-prob."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vespo_megatron.losses.ratios import Ratios
from vespo_megatron.losses.search import counted_tokens


def covariance(
    advantage: Tensor, log_probs: Tensor, mean_advantage: float | Tensor, mean_log_prob: float | Tensor
) -> Tensor:
    """(A − mean A)·(log π − mean log π): float64, of the shape given."""
    return (advantage.double() - mean_advantage) * (log_probs.double() - mean_log_prob)


@dataclass(frozen=True)
class CovarianceSearch:
    """The covariance that the highest `share` of tokens have, at least one token."""

    share: float = 2e-4
    gathers: ClassVar = True
    finds: ClassVar[tuple[str, ...]] = ("mean_advantage", "mean_log_prob", "cov_min")

    def contributions(self, ratios: Ratios) -> Tensor:
        """[2, tokens]: A and log π."""
        return counted_tokens(ratios, [ratios.token_advantage, ratios.log_probs])

    def found(self, contributions: Tensor) -> dict[str, Tensor]:
        """The two means, and `cov_min` []: the least covariance that is high."""
        means = _means(contributions)
        high = covariance(*contributions, **means)
        return means | {"cov_min": _nth_largest(high, _number(self.share, len(high)))}


@dataclass(frozen=True)
class ClipSearch:
    """Which of the tokens within two covariances are drawn, by lot: `share` of all tokens, at least one."""

    share: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    gathers: ClassVar = True
    finds: ClassVar[tuple[str, ...]] = ("mean_advantage", "mean_log_prob", "lot_max")

    def columns(self, ratios: Ratios) -> list[Tensor]:
        """[tokens] each: A, log π, whether the clip leaves it (1 or 0), and its lot."""
        ratio, advantage = ratios.log_ratio.exp(), ratios.token_advantage
        left = torch.where(advantage >= 0, ratio <= 1 + self.clip_high, ratio >= 1 - self.clip_low)
        return [advantage, ratios.log_probs, left.to(ratio.dtype), _lot(ratios.log_probs, ratios.behavior_log_probs)]

    def candidates(
        self, columns: list[Tensor] | Tensor, mean_advantage: float | Tensor, mean_log_prob: float | Tensor
    ) -> Tensor:
        """bool [tokens]: within the covariances, and not clipped; `columns` as the method of that name gives them."""
        advantage, log_probs, left = columns[0], columns[1], columns[2]
        high = covariance(advantage, log_probs, mean_advantage, mean_log_prob)
        return (high > self.cov_low) & (high < self.cov_high) & (left > 0)

    def contributions(self, ratios: Ratios) -> Tensor:
        """[4, tokens]: `columns`."""
        return counted_tokens(ratios, self.columns(ratios))

    def found(self, contributions: Tensor) -> dict[str, Tensor]:
        """The two means, and `lot_max` []: the largest lot that is drawn."""
        means, lots = _means(contributions), contributions[3]
        drawn = _nth_largest(-lots[self.candidates(contributions, **means)], _number(self.share, len(lots)))
        return means | {"lot_max": -drawn}


def _means(contributions: Tensor) -> dict[str, Tensor]:
    count = max(contributions.shape[1], 1)
    return {"mean_advantage": contributions[0].sum() / count, "mean_log_prob": contributions[1].sum() / count}


def _number(share: float, tokens: int) -> int:
    return max(int(share * tokens), 1)


def _nth_largest(values: Tensor, number: int) -> Tensor:
    """[]: the n-th largest; inf where there is none."""
    if not len(values):
        return values.new_full((), torch.inf)
    return values.topk(min(number, len(values))).values[-1]


def _lot(log_probs: Tensor, behavior: Tensor) -> Tensor:
    """[tokens] in [0, 1): a number that looks random, of the token's own numbers."""
    mixed = torch.sin(log_probs.double() * 12.9898 + behavior.double() * 78.233) * 43758.5453
    return mixed - mixed.floor()
