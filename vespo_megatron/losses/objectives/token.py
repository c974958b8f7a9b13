"""Objectives of each token's ratio: GRPO's clip and what came of it, SAPO, CISPO, MinPRO, MASPO."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vespo_megatron.losses.objectives.parts import bounded_for_negatives, by_sign, clipped_ratio
from vespo_megatron.losses.ratios import Ratios
from vespo_megatron.losses.registry import objective


@objective("reinforce", level="token", aggregation="token-mean", source="Williams 1992", uses_ratio=False)
def reinforce(ratios: Ratios) -> Tensor:
    """φ = 1: [tokens]. The on-policy gradient, whatever the ratio."""
    return torch.ones_like(ratios.log_ratio)


@objective("grpo", level="token", aggregation="token-mean", source="arXiv 2402.03300, 2503.14476")
def grpo(ratios: Ratios, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 3.0) -> Tensor:
    """Clipped token ratio: [tokens]. GRPO with DAPO's clip-higher.

    Bounds are relative: 1 − clip_low and 1 + clip_high. `dual_clip` bounds ρ for A < 0: 3 is verl's, 10 that of its
    30B examples, None switches it off. GRPO aggregates seq-mean-token-mean, DAPO token-mean.
    """
    return clipped_ratio(ratios.log_ratio, ratios.token_advantage, 1 - clip_low, 1 + clip_high, dual_clip)


@objective("dr_grpo", level="token", aggregation="token-sum-norm", source="arXiv 2503.20783")
def dr_grpo(ratios: Ratios, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 3.0) -> Tensor:
    """GRPO's φ: [tokens], its dual clip included, which the paper has not and verl has (3).

    What differs is around it: A = R − mean, and Σ tokens / (B·L) with a constant L.
    """
    return clipped_ratio(ratios.log_ratio, ratios.token_advantage, 1 - clip_low, 1 + clip_high, dual_clip)


@objective("sapo", level="token", aggregation="seq-mean-token-mean", source="arXiv 2511.20347")
def sapo(ratios: Ratios, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    """4·σ(τ(ρ−1))·(1 − σ(τ(ρ−1)))·ρ: [tokens]. SAPO (arXiv 2511.20347), τ by the sign of A."""
    ratio = ratios.log_ratio.exp()
    tau = by_sign(ratios.token_advantage, tau_pos, tau_neg)
    gate = torch.sigmoid(tau * (ratio - 1))
    return 4 * gate * (1 - gate) * ratio


@objective("cispo", level="token", aggregation="token-mean", source="arXiv 2506.13585")
def cispo(ratios: Ratios, *, ratio_max: float | None = 5.0, ratio_min: float = 0.0) -> Tensor:
    """clip(ρ, ratio_min, ratio_max), never zero by clipping: [tokens]. CISPO (MiniMax-M1, arXiv 2506.13585).

    Both bounds are absolute ratios, as in TRL. verl and slime give them relative to 1: their 4.0 is our 5.0.
    """
    return ratios.log_ratio.exp().clamp(ratio_min, ratio_max)


@objective("minpro", level="token", aggregation="token-mean", source="arXiv 2601.22718")
def minpro(ratios: Ratios, *, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """clip((min_{i<t} ρ_i)·ρ_t, 1 − clip_low, 1 + clip_high), never zero: [tokens]. MinPRO (arXiv 2601.22718).

    The first token's prefix is empty and counts as ratio 1. Confirmed in the paper's abstract: the cumulative prefix
    ratio is replaced by the minimum token ratio of the preceding prefix. The paper's ε could not be read (only its
    abstract was available when this was written): the defaults are DAPO's and are ours.
    """
    log_ratio = ratios.prefix_min_log_ratio() + ratios.log_ratio
    return log_ratio.exp().clamp(1 - clip_low, 1 + clip_high)


@objective("maspo", level="token", aggregation="token-mean", source="arXiv 2602.17550")
def maspo(
    ratios: Ratios,
    *,
    sigma_base: float = 1.0,
    sigma_max: float = 10.0,
    alpha: float = 0.3,
    beta_pos: float = 0.03,
    beta_neg: float = 0.03,
    risk_min: float = 0.1,
    risk_max: float = 10.0,
    ratio_max: float | None = 20.0,
) -> Tensor:
    """ρ·gate, gate = exp(−(ρ−1)²/2σ²) on the side A pushes to, else 1: [tokens]. MASPO (arXiv 2602.17550).

    σ = clip(σ_base·π_old^−α, σ_base, σ_max) · clip(1 + β₊·A, risk_min, risk_max) for A > 0, and with 1/(1 − β₋·A) for
    A < 0: rare tokens and confident positives get more room. The gate is detached and multiplies the ratio, as read in
    FlyTune/MASPO-RL, verl/trainer/ppo/core_algos.py (its defaults are ours). `ratio_max`: no gradient where A < 0 and ρ
    is above it, of which the source has none; 20 is what verl truncates DPPO's at.
    """
    ratio, advantage = ratios.log_ratio.exp(), ratios.token_advantage
    # In logarithms: π_old^−α overflows for tokens that are all but impossible.
    room = math.log(sigma_max / sigma_base)
    mass = ratios.masked(-alpha * ratios.anchor_log_probs).clamp(0.0, max(room, 0.0)).exp()
    positive = (1 + beta_pos * advantage).clamp(risk_min, risk_max)
    negative = (1 / (1 - beta_neg * advantage.clamp(max=0.0))).clamp(risk_min, risk_max)
    sigma = sigma_base * mass * torch.where(advantage >= 0, positive, negative)
    gate = torch.exp(-((ratio - 1) ** 2) / (2 * sigma**2))
    away = ((advantage > 0) & (ratio > 1)) | ((advantage < 0) & (ratio < 1))
    gated = torch.where(away, ratio * gate, ratio)
    return bounded_for_negatives(gated, ratio, advantage, ratio_max)


@objective("gppo", level="token", aggregation="token-mean", source="arXiv 2508.07629")
def gppo(ratios: Ratios, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 3.0) -> Tensor:
    """GRPO's φ with the bound in place of 0 outside it: [tokens]. GPPO (Klear-Reasoner, arXiv 2508.07629).

    Read in Kwai-Klear/CE-GPPO, verl/trainer/ppo/core_algos.py (compute_gppo_loss), its dual clip included.
    """
    return ce_gppo(ratios, clip_low=clip_low, clip_high=clip_high, beta_low=1.0, beta_high=1.0, dual_clip=dual_clip)


@objective("ce_gppo", level="token", aggregation="token-mean", source="arXiv 2509.20712")
def ce_gppo(
    ratios: Ratios,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    beta_low: float = 0.25,
    beta_high: float = 1.0,
    dual_clip: float | None = 3.0,
) -> Tensor:
    """GRPO's φ; outside the clip β times the bound: [tokens]. CE-GPPO (arXiv 2509.20712).

    A ≥ 0 and ρ > 1 + ε_h: beta_high·(1 + ε_h). A < 0 and ρ < 1 − ε_l: beta_low·(1 − ε_l). Read in Kwai-Klear/CE-GPPO,
    verl/trainer/ppo/core_algos.py (compute_gppo_loss_general_beta; its defaults are ours).
    """
    ratio, advantage = ratios.log_ratio.exp(), ratios.token_advantage
    above, below = (advantage >= 0) & (ratio > 1 + clip_high), (advantage < 0) & (ratio < 1 - clip_low)
    phi = torch.where(above, beta_high * (1 + clip_high), torch.where(below, beta_low * (1 - clip_low), ratio))
    return bounded_for_negatives(phi, ratio, advantage, dual_clip)
