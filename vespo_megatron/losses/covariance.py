"""Searches of Clip-Cov and KL-Cov (arXiv 2505.22617): which tokens have a high covariance of advantage and log-prob."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from vespo_megatron.losses.ratios import Ratios
from vespo_megatron.losses.search import counted_tokens, gathered

_FOUND = ("mean_advantage", "mean_log_prob", "lot_max", "cov_min")


@dataclass(frozen=True)
class CovarianceSearch:
    """The covariance that the highest `share` of tokens have, at least one token."""

    share: float = 2e-4
    gathers = True

    @classmethod
    def from_hyperparameters(cls, given: Mapping[str, Any]) -> Self | None:
        """None where what is searched for is given."""
        if any(given.get(name) is not None for name in _FOUND):
            return None
        return cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given})

    def covariance(self, ratios: Ratios, mean_advantage: float | Tensor, mean_log_prob: float | Tensor) -> Tensor:
        """[tokens]: (A − mean A)·(log π − mean log π)."""
        return _covariance(ratios.token_advantage, ratios.log_probs, mean_advantage, mean_log_prob)

    def contributions(self, ratios: Ratios) -> Tensor:
        """[2, tokens]: A and log π."""
        return counted_tokens(ratios, [ratios.token_advantage, ratios.log_probs])

    def found(self, contributions: Tensor) -> dict[str, Tensor]:
        """The two means, and `cov_min` []: the least covariance that is high."""
        advantage, log_prob = contributions[0], contributions[1]
        means = _means(contributions)
        covariance = _covariance(advantage, log_prob, means["mean_advantage"], means["mean_log_prob"])
        return means | {"cov_min": _nth_largest(covariance, _number(self.share, len(covariance)))}

    def on_call(self, ratios: Ratios) -> dict[str, Tensor]:
        """`found` of the tokens of this call, over context parallelism."""
        return self.found(gathered(self.contributions(ratios), ratios.sequences.group))


@dataclass(frozen=True)
class ClipSearch:
    """Which of the tokens within two covariances are drawn, by lot: `share` of all tokens, at least one."""

    share: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    gathers = True

    @classmethod
    def from_hyperparameters(cls, given: Mapping[str, Any]) -> Self | None:
        """None where what is searched for is given."""
        if any(given.get(name) is not None for name in _FOUND):
            return None
        return cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given})

    def candidates(self, ratios: Ratios, mean_advantage: float | Tensor, mean_log_prob: float | Tensor) -> Tensor:
        """bool [tokens]: within the covariances, and not clipped."""
        covariance = _covariance(ratios.token_advantage, ratios.log_probs, mean_advantage, mean_log_prob)
        return (covariance > self.cov_low) & (covariance < self.cov_high) & self._inside(ratios)

    def lots(self, ratios: Ratios) -> Tensor:
        """[tokens] in [0, 1): a number that looks random, of the token's own numbers."""
        return _lot(ratios.log_probs, ratios.behavior_log_probs)

    def _inside(self, ratios: Ratios) -> Tensor:
        ratio = ratios.log_ratio.exp()
        return torch.where(ratios.token_advantage >= 0, ratio <= 1 + self.clip_high, ratio >= 1 - self.clip_low)

    def contributions(self, ratios: Ratios) -> Tensor:
        """[4, tokens]: A, log π, whether the clip leaves it, its lot."""
        inside = self._inside(ratios).to(ratios.log_probs.dtype)
        return counted_tokens(ratios, [ratios.token_advantage, ratios.log_probs, inside, self.lots(ratios)])

    def found(self, contributions: Tensor) -> dict[str, Tensor]:
        """The two means, and `lot_max` []: the largest lot that is drawn."""
        advantage, log_prob, inside, lots = contributions
        means = _means(contributions)
        covariance = _covariance(advantage, log_prob, means["mean_advantage"], means["mean_log_prob"])
        candidates = (covariance > self.cov_low) & (covariance < self.cov_high) & (inside > 0)
        drawn = _nth_largest(-lots[candidates], _number(self.share, len(lots)))
        return means | {"lot_max": -drawn}

    def on_call(self, ratios: Ratios) -> dict[str, Tensor]:
        """`found` of the tokens of this call, over context parallelism."""
        return self.found(gathered(self.contributions(ratios), ratios.sequences.group))


def _covariance(
    advantage: Tensor, log_prob: Tensor, mean_advantage: float | Tensor, mean_log_prob: float | Tensor
) -> Tensor:
    return (advantage.double() - mean_advantage) * (log_prob.double() - mean_log_prob)


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


def _lot(log_prob: Tensor, behavior: Tensor) -> Tensor:
    mixed = torch.sin(log_prob.double() * 12.9898 + behavior.double() * 78.233) * 43758.5453
    return mixed - mixed.floor()
