"""KL penalty to the reference policy and entropy bonus: the terms of the loss beside −Σ φ·A·log π."""

from __future__ import annotations

import torch
from torch import Tensor

from vespo_megatron.losses.coefficient import Coefficient
from vespo_megatron.losses.config import PolicyLossConfig
from vespo_megatron.losses.loss_inputs import LossInputs
from vespo_megatron.losses.ratios import LOG_RATIO_CLAMP


def regularization_terms(
    inputs: LossInputs, config: PolicyLossConfig, factors: Coefficient, scale: Tensor
) -> list[tuple[str, float, Tensor]]:
    """(metric, factor, differentiable term []) of each term the configuration asks for.

    Args:
        scale: [num_sequences], the aggregation's factor of each token.
    """
    if not config.kl_coefficient and not config.entropy_coefficient:
        return []
    valid = factors.valid_tokens()
    token_scale = factors.sequences.expand(torch.where(factors.bad, 0.0, scale))

    def kept(values: Tensor) -> Tensor:
        values = values.to(scale.dtype)
        return values if valid is None else torch.where(valid, values, 0.0)

    terms: list[tuple[str, float, Tensor]] = []
    if config.kl_coefficient and inputs.ref_log_probs is not None:
        kl = kl_estimate(kept(inputs.log_probs), kept(inputs.ref_log_probs.detach()), config.kl_type)
        terms.append(("loss/kl", config.kl_coefficient, (token_scale * kl).sum()))
    if config.entropy_coefficient and inputs.entropy is not None:
        terms.append(("loss/entropy", -config.entropy_coefficient, (token_scale * kept(inputs.entropy)).sum()))
    return terms


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(π_θ‖π_ref), differentiable in `log_probs`, shapes as given.

    With r = log π_ref − log π_θ (Schulman, "Approximating KL divergence"): k1 = −r, k2 = r²/2, k3 = e^r − 1 − r.
    r is clamped to ±20.
    """
    r = (ref_log_probs - log_probs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    if kind == "k1":
        return -r
    if kind == "k2":
        return r**2 / 2
    return torch.expm1(r) - r
