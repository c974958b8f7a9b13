"""Third step of the policy loss: φ as the objective gives it, and what drops or weighs it after the clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vespo_megatron.losses.config import PolicyLossConfig
from vespo_megatron.losses.corrected_ratios import CorrectedRatios
from vespo_megatron.losses.correction.weights import Weights
from vespo_megatron.losses.entropy import high_entropy
from vespo_megatron.losses.hyperparameters import COMMON
from vespo_megatron.losses.objectives.hooks import opsm_keep
from vespo_megatron.losses.registry import Objective
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
    """bool [num_sequences]: a number of the sequence, or φ of it, is not finite."""
    sequences: PackedSequences
    mask: Tensor | None
    """bool [tokens]"""

    def per_token(self) -> Tensor:
        """[tokens]: φ with the correction, 0 where masked or dropped."""
        if self.is_per_sequence:
            return self.of_tokens(self.sequences.expand(self.of_sequences(self.phi * self.sequence_factor)))
        factor = self.sequences.expand(self.sequence_factor)
        return self.of_tokens(torch.where(factor == 0, 0.0, self.phi * factor))

    def valid_tokens(self) -> Tensor | None:
        """bool [tokens]: neither masked nor of a bad sequence; None: every token (known without a wait)."""
        if self.sequences.on_host and not self.bad.any():
            return self.mask
        good = self.sequences.expand(~self.bad)
        return good if self.mask is None else good & self.mask

    def of_sequences(self, values: Tensor) -> Tensor:
        """`values [num_sequences]`, 0 in bad sequences even where they are NaN."""
        return torch.where(self.bad, 0.0, values)

    def of_tokens(self, values: Tensor) -> Tensor:
        """`values [tokens]` with the correction's part per token, 0 where masked."""
        if self.token_weights.log_weight is not None:  # of a bad sequence the weights may be anything
            values = torch.where(values == 0, 0.0, values * self.token_weights.log_weight.exp())
        values = self.token_weights.kept(values)
        return values if self.mask is None else torch.where(self.mask, values, 0.0)


def coefficient(corrected: CorrectedRatios, config: PolicyLossConfig) -> Coefficient:
    """The coefficient of one micro-batch under `config.objective`."""
    ratios, weights, objective = corrected.ratios, corrected.sequence_weights, config.objective
    hyperparameters = dict(config.hyperparameters)
    common = {name: hyperparameters.pop(name) for name in COMMON if name in hyperparameters}
    phi = objective(ratios, **hyperparameters)
    per_sequence = objective.level == "sequence"
    bad = corrected.bad | (~phi.isfinite() if per_sequence else _bad_tokens(phi, corrected, objective))
    factor = (~bad).to(ratios.log_probs.dtype)
    if weights.log_weight is not None:
        factor = factor * weights.log_weight.exp()
    factor = weights.kept(factor)
    if (delta := common.get("opsm_delta")) is not None:
        against = common.get("opsm_anchor", "behavior")
        moved = corrected.to_behavior - (0.0 if against == "behavior" else corrected.mismatch)
        factor = factor * opsm_keep(ratios.sequence_advantage, moved, corrected.lengths, delta)
    return Coefficient(
        phi=phi,
        is_per_sequence=per_sequence,
        sequence_factor=torch.where(bad, 0.0, factor),
        token_weights=corrected.token_weights.dropping(high_entropy(ratios, common)),
        bad=bad,
        sequences=ratios.sequences,
        mask=ratios.mask,
    )


def _bad_tokens(phi: Tensor, corrected: CorrectedRatios, objective: Objective) -> Tensor:
    """bool [num_sequences]: where φ of a token that counts is not finite.

    φ of the objectives here is finite wherever the log-probs are (`tests/losses/test_fuzz.py`), so what this finds is
    known to every context parallel rank already. Of a φ of the user's own it is not: that costs a second all-reduce.
    """
    ratios = corrected.ratios
    shared = ratios.sequences.group is not None and objective.is_users_own
    if ratios.sequences.on_host and not shared and phi.sum().isfinite():
        return torch.zeros_like(corrected.bad)
    found = ratios.masked(corrected.token_weights.kept((~phi.isfinite()).to(ratios.log_probs.dtype)))
    count = ratios.sequences.local_sum(found)
    return (ratios.sequences.all_reduce(count) if shared else count) > 0
