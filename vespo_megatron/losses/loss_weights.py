"""Fourth step of the policy loss: the weight of log π, which is φ times advantage times aggregation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vespo_megatron.losses.aggregation import Normalizer, sequence_scale
from vespo_megatron.losses.coefficient import Coefficient
from vespo_megatron.losses.config import PolicyLossConfig
from vespo_megatron.losses.corrected_ratios import CorrectedRatios


@dataclass(frozen=True)
class LossWeights:
    """The weights whose sum with log π is the loss, but for its sign."""

    weight: Tensor
    """[num_sequences] where tokens matter through sums alone (`CorrectedRatios.log_prob_sum`), else [tokens]."""
    scale: Tensor
    """[num_sequences]: the aggregation's factor of each token."""
    coefficient: Tensor | None
    """[tokens]: `Coefficient.per_token`, where the weights needed it."""


def loss_weights(
    corrected: CorrectedRatios, factors: Coefficient, config: PolicyLossConfig, normalizer: Normalizer | None
) -> LossWeights:
    """The weights of one micro-batch; see `compute_policy_loss` for `normalizer`."""
    ratios, lengths = corrected.ratios, corrected.lengths
    if config.correction is not None and config.correction.denominator == "kept":
        lengths = corrected.kept_lengths
    # What is bad counts in no denominator made here: the others are as if it were not there.
    lengths = torch.where(factors.bad, 0.0, lengths) if normalizer is None else lengths
    scale = sequence_scale(config.aggregation, _normalizer(normalizer, config.aggregation_length, lengths), lengths)
    if factors.is_per_sequence and not ratios.per_token_advantage:
        product = factors.phi * factors.sequence_factor * ratios.sequence_advantage * scale
        weight = factors.of_sequences(product)
        if corrected.log_prob_sum is None:
            weight = factors.of_tokens(ratios.sequences.expand(weight))
        return LossWeights(weight, scale, None)
    coefficient = factors.per_token()
    factor = scale if ratios.per_token_advantage else scale * ratios.sequence_advantage
    weight = coefficient * ratios.sequences.expand(factors.of_sequences(factor))
    if ratios.per_token_advantage:
        weight = weight * torch.where(coefficient == 0, 0.0, ratios.advantage)
    return LossWeights(weight, scale, coefficient)


def _normalizer(given: Normalizer | None, length: float | None, lengths: Tensor) -> Normalizer:
    """`given`, or the counts of this micro-batch; with the constant `length` of token-sum-norm where it has none."""
    if given is None:
        return Normalizer(lengths.sum(), (lengths > 0).sum(), length)
    if given.length is None and length is not None:
        return replace(given, length=length)
    return given
