"""KL penalty to the reference policy and entropy bonus: the terms of the loss beside −Σ φ·A·log π."""

from __future__ import annotations

from collections.abc import Callable

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
        log_probs = kept(inputs.log_probs)
        kl = kl_estimate(
            log_probs,
            kept(inputs.ref_log_probs.detach()),
            config.kl_type,
            log_weight=_log_weight(log_probs, inputs, config, kept),
            input_clamp=config.kl_input_clamp,
            output_clamp=config.kl_output_clamp,
        )
        terms.append(("loss/kl", config.kl_coefficient, (token_scale * kl).sum()))
    if config.entropy_coefficient and inputs.entropy is not None:
        terms.append(("loss/entropy", -config.entropy_coefficient, (token_scale * kept(inputs.entropy)).sum()))
    return terms


def _log_weight(
    log_probs: Tensor, inputs: LossInputs, config: PolicyLossConfig, kept: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """[tokens]: log of what weighs the estimate, with its gradient; None: nothing."""
    if config.kl_weight == "none":
        return None
    if config.kl_weight == "score":
        return log_probs - log_probs.detach()
    old = inputs.old_log_probs if config.kl_weight == "anchor" and config.behavior != "rollout" else None
    return log_probs - kept((inputs.behavior_log_probs if old is None else old).detach())


def kl_estimate(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    kind: str,
    *,
    log_weight: Tensor | None = None,
    input_clamp: float | None = 20.0,
    output_clamp: float | None = 10.0,
) -> Tensor:
    """Per-token estimate of KL(π_θ‖π_ref), differentiable in `log_probs`, shapes as given.

    With r = log π_ref − log π_θ (Schulman, "Approximating KL divergence"): k1 = −r, k2 = r²/2, k3 = e^r − 1 − r. Its
    expectation is the KL's; its gradient's is not, unless it is weighted by a ratio that has π_θ's gradient, which
    makes Σ π_θ·k the thing that is differentiated. Clamps as in NeMo-RL (nemo_rl/algorithms/utils.py, calculate_kl):
    where one holds, neither the estimate nor the weight has a gradient.

    Args:
        log_weight: log of the weight; at most 20.
        input_clamp: bound of |r|; None: none.
        output_clamp: bound of the weighted estimate; None: none.
    """
    r = ref_log_probs - log_probs
    weight = None if log_weight is None else log_weight.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    if input_clamp is not None:
        inside = r.abs() <= input_clamp
        r = r.clamp(-input_clamp, input_clamp)
        weight = None if weight is None else torch.where(inside, weight, weight.detach())
    if kind == "k1":
        kl = -r
    elif kind == "k2":
        kl = r**2 / 2
    else:
        kl = torch.expm1(r) - r
    kl = kl if weight is None else weight * kl
    return kl if output_clamp is None else kl.clamp(-output_clamp, output_clamp)
