"""Objectives that name the behaviour policy: DPPO against μ; those that clip against π_old and weigh by π_old/μ."""

from __future__ import annotations

import torch
from torch import Tensor

from vespo_megatron.losses.objectives.parts import at_most, clipped_ratio
from vespo_megatron.losses.ratios import LOG_RATIO_CLAMP, Ratios
from vespo_megatron.losses.registry import objective

ALREADY_CORRECTED = "its ratio is already π_θ/μ; a weight π_old/μ would count the mismatch twice"


@objective(
    "dppo_tv",
    level="token",
    aggregation="token-mean",
    source="arXiv 2602.04879",
    anchor="behavior",
    corrections=ALREADY_CORRECTED,
)
def dppo_tv(
    ratios: Ratios, *, delta_low: float = 0.15, delta_high: float = 0.15, ratio_max: float | None = 20.0
) -> Tensor:
    """min(ρ, ratio_max)·keep: [tokens]. DPPO with the total-variation mask (arXiv 2602.04879), anchored to μ.

    Drops a token that has moved further than δ in probability in the direction A pushes it:
    (A > 0 and π − μ > delta_high) or (A < 0 and μ − π > delta_low). δ .15 is that of verl's script, which does
    not truncate; 20 is where verl's compute_policy_loss_dppo_tv does when its configuration names no bound.
    """
    moved = ratios.log_probs.exp() - ratios.behavior_log_probs.exp()
    advantage = ratios.token_advantage
    drop = ((advantage > 0) & (moved > delta_high)) | ((advantage < 0) & (-moved > delta_low))
    return torch.where(drop, 0.0, at_most(ratios.log_ratio.exp(), ratio_max))


@objective(
    "dppo_kl",
    level="token",
    aggregation="token-mean",
    source="arXiv 2602.04879",
    anchor="behavior",
    corrections=ALREADY_CORRECTED,
)
def dppo_kl(
    ratios: Ratios, *, delta_low: float = 0.05, delta_high: float = 0.05, ratio_max: float | None = 20.0
) -> Tensor:
    """min(ρ, ratio_max)·keep: [tokens]. DPPO with the binary-KL mask (arXiv 2602.04879), anchored to μ.

    D = μ·log(μ/π) + (1−μ)·log((1−μ)/(1−π)): drops a token that A pushes further away and whose D is above delta_high
    (A > 0) or delta_low (A < 0). δ .05 is that of verl's scripts.
    """
    largest = 1 - torch.finfo(ratios.log_probs.dtype).eps
    pi, mu = (values.exp().clamp(max=largest) for values in (ratios.log_probs, ratios.behavior_log_probs))
    divergence = mu * (ratios.behavior_log_probs - ratios.log_probs) + (1 - mu) * (torch.log1p(-mu) - torch.log1p(-pi))
    advantage = ratios.token_advantage
    drop = ((advantage > 0) & (pi > mu) & (divergence > delta_high)) | (
        (advantage < 0) & (pi < mu) & (divergence > delta_low)
    )
    return torch.where(drop, 0.0, at_most(ratios.log_ratio.exp(), ratio_max))


@objective(
    "minirl",
    level="token",
    aggregation="seq-mean-token-sum",
    source="arXiv 2512.01374",
    anchor="old",
    corrections="π_old/μ, truncated at tis_cap, is part of the objective",
)
def minirl(
    ratios: Ratios,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.27,
    tis_cap: float | None = 5.0,
    dual_clip: float | None = 3.0,
) -> Tensor:
    """M_t·sg[π_θ/μ]: [tokens]. MiniRL (arXiv 2512.01374); needs π_old.

    M is PPO's mask on π_θ/π_old; π_θ/μ = (π_θ/π_old)·(π_old/μ), the second factor truncated at `tis_cap`. Aggregated
    with no length norm (seq-mean-token-sum), A = R − mean. `dual_clip` (verl's) bounds π_θ/π_old where A < 0.
    """
    kept = clipped_ratio(ratios.log_ratio, ratios.token_advantage, 1 - clip_low, 1 + clip_high, dual_clip)
    return kept * at_most(_mismatch(ratios), tis_cap)


def _mismatch(ratios: Ratios) -> Tensor:
    """[tokens]: π_old/μ, at most e^20."""
    return ratios.masked(ratios.anchor_log_probs - ratios.behavior_log_probs).clamp(max=LOG_RATIO_CLAMP).exp()


@objective(
    "decoupled_ppo",
    level="token",
    aggregation="token-mean",
    source="arXiv 2110.00641, 2505.24298",
    anchor="old",
    corrections="π_old/μ is part of the objective",
)
def decoupled_ppo(
    ratios: Ratios,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    behavior_weight_cap: float | None = 5.0,
    dual_clip: float | None = 3.0,
) -> Tensor:
    """(π_old/μ)·u·1[u inside the clip], u = π_θ/π_old: [tokens]. Decoupled PPO (arXiv 2110.00641; AReaL 2505.24298).

    π_old is the proximal policy; needs it. Tokens with π_old/μ > `behavior_weight_cap` are dropped: 5 in AReaL's
    examples (rejection_sampling.upper). `dual_clip` (AReaL's c_clip, off there; 3 in verl) bounds u where A < 0.
    """
    kept = clipped_ratio(ratios.log_ratio, ratios.token_advantage, 1 - clip_low, 1 + clip_high, dual_clip)
    mismatch = _mismatch(ratios)
    if behavior_weight_cap is not None:
        mismatch = torch.where(mismatch <= behavior_weight_cap, mismatch, 0.0)
    return kept * mismatch
