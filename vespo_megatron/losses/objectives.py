"""φ of every objective (VESPO, GRPO, GSPO, SAPO, …): the detached coefficient of A·∇log π in −Σ φ·A·log π.

Each function takes `Ratios` and its hyperparameters and returns `[num_sequences]` (sequence objectives) or `[tokens]`
(token objectives). ρ_t = π_θ/π_anchor per token, S = Σ log ρ over the whole response, T its length, W = e^S.
"positive" means A ≥ 0. Bounds are inclusive: a ratio exactly on a bound still has its gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.bapo import BoundSearch
from vespo_megatron.losses.ratios import LOG_RATIO_CLAMP, Ratios
from vespo_megatron.losses.registry import objective, unknown

MIN_LOG_W = math.log(1e-8)
"""The reference keeps W ≥ 1e-8."""
MAX_LOG_W = 20.0


def clipped_ratio(
    log_ratio: Tensor, advantage: Tensor, low: float | Tensor, high: float | Tensor, dual_clip: float | None = None
) -> Tensor:
    """PPO's φ: ρ where the clipped surrogate has a gradient, else 0; shapes as given.

    A ≥ 0: ρ·1[ρ ≤ high]. A < 0: ρ·1[low ≤ ρ], and ρ ≤ dual_clip where one is set (arXiv 1912.09729). ρ is at most e^20.
    """
    ratio = log_ratio.clamp(max=LOG_RATIO_CLAMP).exp()
    keep_negative = ratio >= low
    if dual_clip is not None:
        keep_negative &= ratio <= dual_clip
    return torch.where(torch.where(advantage >= 0, ratio <= high, keep_negative), ratio, 0.0)


def by_sign(advantage: Tensor, positive: float, negative: float) -> Tensor:
    """`positive` where A ≥ 0, `negative` elsewhere, in the type of `advantage` and of its shape."""
    return torch.where(advantage >= 0, advantage.new_full((), positive), advantage.new_full((), negative))


@objective(
    "vespo", level="sequence", aggregation="token-mean", source="arXiv 2602.10693", correction_apply="before_clip"
)
def vespo(
    ratios: Ratios,
    *,
    c1_pos: float = 2.0,
    c2_pos: float = 3.0,
    c1_neg: float = 3.0,
    c2_neg: float = 2.0,
    normalization: str = "none",
) -> Tensor:
    """φ(W) = W^c1·exp(c2·(1−W)), computed as exp(c2 + c1·S − c2·e^S): [num_sequences].

    VESPO (arXiv 2602.10693 v3; FloyedShen/VESPO). Numerics of the reference: S in [log 1e-8, 20], non-finite φ → 0.

    Args:
        c1_pos, c2_pos: for A ≥ 0. c1_neg, c2_neg: for A < 0.
        normalization: none; the paper's ablations put sqrt (S/√T) or linear (S/T) in place of S.
    """
    log_w = ratios.clamped_sequence_log_ratio
    if normalization == "sqrt":
        log_w = log_w / ratios.safe_lengths.sqrt()
    elif normalization == "linear":
        log_w = log_w / ratios.safe_lengths
    elif normalization != "none":
        raise unknown(
            "normalization", normalization, ("none", "sqrt", "linear"), where="loss_fn.hyperparameters of vespo"
        )
    log_w = log_w.clamp(MIN_LOG_W, MAX_LOG_W)
    c1 = by_sign(ratios.sequence_advantage, c1_pos, c1_neg)
    c2 = by_sign(ratios.sequence_advantage, c2_pos, c2_neg)
    return torch.exp(c2 + c1 * log_w - c2 * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@objective("reinforce", level="token", aggregation="token-mean", source="Williams 1992", uses_ratio=False)
def reinforce(ratios: Ratios) -> Tensor:
    """φ = 1: [tokens]. The on-policy gradient, whatever the ratio."""
    return torch.ones_like(ratios.log_ratio)


@objective("grpo", level="token", aggregation="token-mean", source="arXiv 2402.03300, 2503.14476")
def grpo(ratios: Ratios, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 3.0) -> Tensor:
    """Clipped token ratio: [tokens]. GRPO with DAPO's clip-higher.

    Bounds are relative: 1 − clip_low and 1 + clip_high. `dual_clip` bounds ρ for A < 0: 3 is verl's, 10 that of the
    VESPO scripts, None switches it off. GRPO aggregates seq-mean-token-mean, DAPO token-mean.
    """
    return clipped_ratio(ratios.log_ratio, ratios.token_advantage, 1 - clip_low, 1 + clip_high, dual_clip)


@objective("dr_grpo", level="token", aggregation="token-sum-norm", source="arXiv 2503.20783")
def dr_grpo(ratios: Ratios, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 3.0) -> Tensor:
    """GRPO's φ: [tokens], its dual clip included, which the paper has not and verl has (3).

    What differs is around it: A = R − mean, and Σ tokens / (B·L) with a constant L.
    """
    return clipped_ratio(ratios.log_ratio, ratios.token_advantage, 1 - clip_low, 1 + clip_high, dual_clip)


@objective("gspo", level="sequence", aggregation="seq-mean-token-mean", source="arXiv 2507.18071")
def gspo(
    ratios: Ratios, *, clip_low: float = 3e-4, clip_high: float = 4e-4, log_ratio_max: float | None = 10.0
) -> Tensor:
    """s·1[s inside the clip], s = e^(S/T): [num_sequences]. GSPO (arXiv 2507.18071).

    `log_ratio_max`: no gradient where A < 0 and log s is above it; verl's compute_policy_loss_gspo clamps it at 10.
    """
    log_s = ratios.sequence_log_ratio / ratios.safe_lengths
    return clipped_ratio(log_s, ratios.sequence_advantage, 1 - clip_low, 1 + clip_high, _ratio(log_ratio_max))


@objective("gspo_token", level="token", aggregation="seq-mean-token-mean", source="arXiv 2507.18071")
def gspo_token(
    ratios: Ratios, *, clip_low: float = 3e-4, clip_high: float = 4e-4, log_ratio_max: float | None = 10.0
) -> Tensor:
    """GSPO's φ with the clip decided by each token's own advantage: [tokens] (arXiv 2507.18071 §4.3)."""
    log_s = ratios.sequences.expand(ratios.sequence_log_ratio / ratios.safe_lengths)
    return clipped_ratio(log_s, ratios.token_advantage, 1 - clip_low, 1 + clip_high, _ratio(log_ratio_max))


def _ratio(log_ratio: float | None) -> float | None:
    return None if log_ratio is None else math.exp(log_ratio)


@objective("sapo", level="token", aggregation="seq-mean-token-mean", source="arXiv 2511.20347")
def sapo(ratios: Ratios, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    """4·σ(τ(ρ−1))·(1 − σ(τ(ρ−1)))·ρ: [tokens]. SAPO (arXiv 2511.20347), τ by the sign of A."""
    ratio = ratios.log_ratio.exp()
    tau = by_sign(ratios.token_advantage, tau_pos, tau_neg)
    gate = torch.sigmoid(tau * (ratio - 1))
    return 4 * gate * (1 - gate) * ratio


@objective("cispo", level="token", aggregation="token-mean", source="arXiv 2506.13585")
def cispo(ratios: Ratios, *, ratio_max: float = 5.0, ratio_min: float = 0.0) -> Tensor:
    """clip(ρ, ratio_min, ratio_max), never zero by clipping: [tokens]. CISPO (MiniMax-M1, arXiv 2506.13585).

    Both bounds are absolute ratios, as in TRL. verl and slime give them relative to 1: their 4.0 is our 5.0.
    """
    return ratios.log_ratio.exp().clamp(ratio_min, ratio_max)


@objective("topr", level="sequence", aggregation="token-mean", source="arXiv 2503.14286")
def topr(ratios: Ratios, *, length_normalized: bool = False) -> Tensor:
    """A ≥ 0: 1; A < 0: min(W, 1): [num_sequences]. TOPR (arXiv 2503.14286).

    `length_normalized` takes e^(S/T) for W, the form the VESPO paper compares with.
    """
    log_w = ratios.sequence_log_ratio
    if length_normalized:
        log_w = log_w / ratios.safe_lengths
    return torch.where(ratios.sequence_advantage >= 0, 1.0, log_w.clamp(max=0.0).exp())


@objective("minpro", level="token", aggregation="token-mean", source="arXiv 2601.22718")
def minpro(ratios: Ratios, *, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """clip((min_{i<t} ρ_i)·ρ_t, 1 − clip_low, 1 + clip_high), never zero: [tokens]. MinPRO (arXiv 2601.22718).

    The first token's prefix is empty and counts as ratio 1. Confirmed in the paper's abstract: the cumulative prefix
    ratio is replaced by the minimum token ratio of the preceding prefix. The paper's ε could not be read (only its
    abstract was available when this was written): the defaults are DAPO's and are ours.
    """
    log_ratio = ratios.prefix_min_log_ratio() + ratios.log_ratio
    return log_ratio.exp().clamp(1 - clip_low, 1 + clip_high)


@objective(
    "dppo_tv",
    level="token",
    aggregation="token-mean",
    source="arXiv 2602.04879",
    anchor="behavior",
    corrections="its ratio is already π_θ/μ; a weight π_old/μ would count the mismatch twice",
)
def dppo_tv(
    ratios: Ratios, *, delta_low: float = 0.15, delta_high: float = 0.15, ratio_max: float | None = 20.0
) -> Tensor:
    """min(ρ, ratio_max)·keep: [tokens]. DPPO with the total-variation mask (arXiv 2602.04879), anchored to μ.

    Drops a token that has moved further than δ in probability in the direction A pushes it:
    (A > 0 and π − μ > delta_high) or (A < 0 and μ − π > delta_low). δ .15 is that of verl's scripts, which do not
    truncate; Stable-RL truncates at 20.
    """
    moved = ratios.log_probs.exp() - ratios.behavior_log_probs.exp()
    advantage = ratios.token_advantage
    drop = ((advantage > 0) & (moved > delta_high)) | ((advantage < 0) & (-moved > delta_low))
    return torch.where(drop, 0.0, ratios.log_ratio.exp().clamp(max=ratio_max))


@objective(
    "dppo_kl",
    level="token",
    aggregation="token-mean",
    source="arXiv 2602.04879",
    anchor="behavior",
    corrections="its ratio is already π_θ/μ; a weight π_old/μ would count the mismatch twice",
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
    return torch.where(drop, 0.0, ratios.log_ratio.exp().clamp(max=ratio_max))


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
    return kept * _mismatch(ratios).clamp(max=tis_cap)


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
    is above it, of which the source has none; 20 is what Stable-RL truncates ratios at.
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
    return gated if ratio_max is None else torch.where((advantage < 0) & (ratio > ratio_max), 0.0, gated)


@objective("bapo", level="token", aggregation="token-mean", source="arXiv 2510.18927")
def bapo(
    ratios: Ratios,
    *,
    ratio_low: float | Tensor | None = None,
    ratio_high: float | Tensor | None = None,
    target_share: float = BoundSearch.target_share,
    low_start: float = BoundSearch.low_start,
    low_max: float = BoundSearch.low_max,
    low_step: float = BoundSearch.low_step,
    high_start: float = BoundSearch.high_start,
    high_max: float = BoundSearch.high_max,
    high_step: float = BoundSearch.high_step,
    dual_clip: float | None = 3.0,
) -> Tensor:
    """GRPO's φ between two bounds that move until positives carry `target_share` of the policy loss: [tokens].

    BAPO (arXiv 2510.18927). Read in WooooDyy/BAPO, recipe/bapo/policy_loss.py and config.py: bounds are ratios; the
    lower one rises first, step .05, to its maximum, then the upper one, step .05 (its example script: .05 and .1, from
    .8/1.2 to .95/2.0); the search stops once positive/negative ≥ adv_ratio_target (1.0 in config.py, .5 in the
    script), which is a share of .5 (of 1/3); contributions are those of the clipped surrogate, min(ρ, high)·A and
    max(ρ, low)·|A|, summed over every rank; dual clip 3. Under that count a rising lower bound can only lower the
    share: this is what the source does, kept as it is. It searches per micro-batch call, and so do we when no bounds
    are given; give `ratio_low` and `ratio_high` (from `BoundSearch.bounds` on the mini-batch's summed
    `BoundSearch.contributions`) for a result that does not depend on how the mini-batch is split.
    """
    if (ratio_low is None) != (ratio_high is None):
        raise UserError(
            "one bound is given without the other",
            where="loss_fn.hyperparameters of bapo",
            expected="both of ratio_low and ratio_high, or neither",
        )
    if ratio_low is None or ratio_high is None:
        search = BoundSearch(target_share, low_start, low_max, low_step, high_start, high_max, high_step)
        contributions = ratios.sequences.all_reduce(search.contributions(ratios))
        ratio_low, ratio_high = search.bounds(contributions)
    return clipped_ratio(ratios.log_ratio, ratios.token_advantage, ratio_low, ratio_high, dual_clip)


def opsm_keep(sequence_advantage: Tensor, sequence_log_ratio: Tensor, lengths: Tensor, delta: float) -> Tensor:
    """Off-policy sequence mask (DeepSeek-V3.2, arXiv 2512.02556): bool [num_sequences], composes with any φ.

    False where A < 0 and mean_t(log μ − log π_θ) > δ: negatives the policy has already left. μ is the policy that drew
    the tokens, so that staleness and the engines' mismatch both count (TRL's choice, said in its GRPO trainer);
    `opsm_anchor: old` judges π_old. No correction is in it.
    """
    return ~((sequence_advantage < 0) & (-sequence_log_ratio / lengths.clamp(min=1) > delta))
