"""Weights of a correction: of the tokens and of the responses of one micro-batch.

A token's weight multiplies its token; a response's weight enters **once**, whatever the length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vespo_megatron.losses.correction.config import CorrectionConfig
from vespo_megatron.losses.ratios import LOG_RATIO_CLAMP

SMALLEST_MEAN_WEIGHT = 1e-8
"""Weights whose mean is not above this are not divided by it, as in verl and slime."""


@dataclass(frozen=True)
class Weights:
    """What a correction does to tokens, or to responses."""

    log_weight: Tensor | None = None
    """float: log of the weight, 0 where dropped; None: no weight."""
    keep: Tensor | None = None
    """bool: what is not dropped; None: everything."""

    def dropping(self, keep: Tensor | None) -> Weights:
        """The same, keeping only what `keep` keeps as well; None keeps everything."""
        if keep is None:
            return self
        return Weights(self.log_weight, keep if self.keep is None else self.keep & keep)

    def times(self, log_weight: Tensor) -> Weights:
        """The same, with every weight multiplied by e^`log_weight`."""
        return Weights(log_weight if self.log_weight is None else self.log_weight + log_weight, self.keep)

    def divided(self, log_mean: Tensor) -> Weights:
        """The same, with every weight divided by e^`log_mean`."""
        return self if self.log_weight is None else Weights(self.log_weight - log_mean, self.keep)

    def kept(self, values: Tensor) -> Tensor:
        """`values`, of the same shape, 0 where dropped whatever they are there."""
        return values if self.keep is None else torch.where(self.keep, values, 0.0)

    def values(self) -> Tensor | None:
        """The weights themselves, 0 where dropped; None: no weight."""
        if self.log_weight is None:
            return None
        return self.kept(self.log_weight.exp())


def bounded(config: CorrectionConfig, log_weight: Tensor) -> Weights:
    """The weights of `config`, of tokens or of responses: shapes as `log_weight`, log w before the bounds."""
    low, high = config.bounds
    if config.weight == "tis":
        lowest = math.log(low) if low > 0 else -math.inf
        return Weights(log_weight.clamp(lowest, min(math.log(high), LOG_RATIO_CLAMP)))
    weight = log_weight.exp()
    keep = (weight >= low) & (weight <= high)
    # A dropped token leaves S; the reference turns its weight 0 into log 1e-8, which empties the whole response.
    return Weights(torch.where(keep, log_weight.clamp(max=LOG_RATIO_CLAMP), 0.0), keep)


def token_weights(config: CorrectionConfig, log_weight: Tensor) -> Weights:
    """The weights of tokens: [tokens].

    Args:
        log_weight: [tokens], d = log π_train − log μ, 0 where masked.
    """
    return bounded(config, log_weight) if config.weighs and config.level == "token" else Weights()


def sequence_weights(config: CorrectionConfig, log_weight_sum: Tensor, lengths: Tensor) -> Weights:
    """The weights of responses: [num_sequences].

    Args:
        log_weight_sum: [num_sequences], Σ d.
        lengths: [num_sequences], T.
    """
    if not config.weighs or config.level == "token":
        return Weights()
    return bounded(config, log_weight_sum / lengths.clamp(min=1) if config.level == "geometric" else log_weight_sum)


def log_mean_weight(total: Tensor, count: Tensor | float) -> Tensor:
    """[]: log of total/count, what normalised weights are divided by; 0 where there is next to nothing to divide by."""
    mean = total / (count.to(total).clamp(min=1) if isinstance(count, Tensor) else max(count, 1.0))
    return torch.where(mean > SMALLEST_MEAN_WEIGHT, mean, 1.0).log()
