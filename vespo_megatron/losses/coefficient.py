"""Third step of the policy loss: φ as the objective gives it, and what drops or weighs it after the clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vespo_megatron.losses import objectives
from vespo_megatron.losses.config import PolicyLossConfig
from vespo_megatron.losses.corrected_ratios import CorrectedRatios
from vespo_megatron.losses.correction import Weights
from vespo_megatron.losses.sequence import PackedSequences


@dataclass(frozen=True)
class Coefficient:
    """The coefficient of A·∇log π in its parts; 0 in a bad sequence, whatever φ is there."""

    phi: Tensor
    """[num_sequences] or [tokens]: as the objective gives it."""
    is_per_sequence: bool
    """Whether φ is one number per sequence."""
    sequence_factor: Tensor
    """[num_sequences]: weight of the correction, 0 in sequences that are bad or dropped."""
    token_weights: Weights
    """[tokens]: what a correction does to tokens."""
    bad: Tensor
    """bool [num_sequences]"""
    sequences: PackedSequences
    mask: Tensor | None
    """bool [tokens]"""

    def per_token(self) -> Tensor:
        """[tokens]: φ with the correction, 0 where masked or dropped."""
        if self.is_per_sequence:
            return self.of_tokens(self.sequences.expand(self.of_sequences(self.phi * self.sequence_factor)))
        factor = self.sequences.expand(self.sequence_factor)
        return self.of_tokens(torch.where(factor == 0, 0.0, self.phi * factor))

    def of_sequences(self, values: Tensor) -> Tensor:
        """`values [num_sequences]`, 0 in bad sequences even where they are NaN."""
        return torch.where(self.bad, 0.0, values)

    def of_tokens(self, values: Tensor) -> Tensor:
        """`values [tokens]` with the correction's part per token, 0 where masked."""
        if self.token_weights.keep is not None:
            values = values * self.token_weights.keep
        if self.token_weights.log_weight is not None:
            values = values * self.token_weights.log_weight.exp()
        return values if self.mask is None else torch.where(self.mask, values, 0.0)


def coefficient(corrected: CorrectedRatios, config: PolicyLossConfig) -> Coefficient:
    """The coefficient of one micro-batch under `config.objective`."""
    ratios, weights = corrected.ratios, corrected.sequence_weights
    hyperparameters = dict(config.hyperparameters)
    opsm_delta = hyperparameters.pop("opsm_delta", None)
    phi = config.objective.phi(ratios, **hyperparameters)
    factor = (~corrected.bad).to(ratios.log_probs.dtype)
    if weights.keep is not None:
        factor = factor * weights.keep
    if weights.log_weight is not None:
        factor = factor * weights.log_weight.exp()
    if opsm_delta is not None:
        factor = factor * objectives.opsm_keep(
            ratios.sequence_advantage, ratios.sequence_log_ratio, ratios.lengths, opsm_delta
        )
    return Coefficient(
        phi=phi,
        is_per_sequence=config.objective.level == "sequence",
        sequence_factor=factor,
        token_weights=corrected.token_weights,
        bad=corrected.bad,
        sequences=ratios.sequences,
        mask=ratios.mask,
    )
