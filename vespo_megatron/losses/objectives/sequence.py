"""Objectives of the whole response's ratio: VESPO and TOPR of W = e^S; GSPO, LUSPO and GMPO of a mean; OPMD of S."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vespo_megatron.losses.objectives.parts import bounded_for_negatives, by_sign, clipped_ratio, divisor
from vespo_megatron.losses.ratios import LOG_RATIO_CLAMP, Ratios
from vespo_megatron.losses.registry import objective, unknown

MIN_LOG_W = math.log(1e-8)
"""The reference keeps W ≥ 1e-8."""
MAX_LOG_W = 20.0


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


@objective("topr", level="sequence", aggregation="token-mean", source="arXiv 2503.14286")
def topr(ratios: Ratios, *, length_normalized: bool = False) -> Tensor:
    """A ≥ 0: 1; A < 0: min(W, 1): [num_sequences]. TOPR (arXiv 2503.14286).

    `length_normalized` takes e^(S/T) for W, the form the VESPO paper compares with.
    """
    log_w = ratios.sequence_log_ratio
    if length_normalized:
        log_w = log_w / ratios.safe_lengths
    return torch.where(ratios.sequence_advantage >= 0, 1.0, log_w.clamp(max=0.0).exp())


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


@objective("luspo", level="sequence", aggregation="seq-mean-token-sum", source="arXiv 2602.05261")
def luspo(
    ratios: Ratios, *, clip_low: float = 2e-3, clip_high: float = 2.5e-3, log_ratio_max: float | None = 10.0
) -> Tensor:
    """GSPO's φ: [num_sequences]. LUSPO (arXiv 2602.05261, as TRL has it: loss_type luspo).

    What differs is around it: each response's loss is multiplied by its length, which is seq-mean-token-sum. ε are
    those of the paper's section 5.1 by TRL's docs/source/paper_index.md.
    """
    return gspo(ratios, clip_low=clip_low, clip_high=clip_high, log_ratio_max=log_ratio_max)


@objective("gmpo", level="token", aggregation="seq-mean-token-mean", source="arXiv 2507.20673")
def gmpo(
    ratios: Ratios, *, log_clip_low: float = 0.4, log_clip_high: float = 0.4, ratio_max: float | None = 20.0
) -> Tensor:
    """G·1[token inside the clip]: [tokens], G the geometric mean of the clipped ratios. GMPO (arXiv 2507.20673).

    The clip is of log ρ, on the side A pushes to, as in verl's compute_policy_loss_geo_mean: log ρ_t ≤ log_clip_high
    for A ≥ 0, ≥ −log_clip_low for A < 0; the paper's .4. `ratio_max`: no gradient where A < 0 and G is above it (verl
    has no bound). The mean over the whole response costs one more all-reduce of [num_sequences] under context
    parallelism.
    """
    positive = ratios.token_advantage >= 0
    log_ratio = ratios.log_ratio
    clipped = torch.where(positive, log_ratio.clamp(max=log_clip_high), log_ratio.clamp(min=-log_clip_low))
    mean = ratios.sequence_sum(clipped) / ratios.safe_lengths
    geometric = ratios.sequences.expand(mean).clamp(max=LOG_RATIO_CLAMP).exp()
    inside = torch.where(positive, log_ratio <= log_clip_high, log_ratio >= -log_clip_low)
    return bounded_for_negatives(torch.where(inside, geometric, 0.0), geometric, ratios.token_advantage, ratio_max)


@objective("opmd", level="sequence", aggregation="seq-mean-token-mean", source="arXiv 2501.12599")
def opmd(ratios: Ratios, *, tau: float = 0.01) -> Tensor:
    """1 − τ·S/A: [num_sequences]. Online policy mirror descent of Kimi k1.5 (arXiv 2501.12599, equation 3).

    The gradient of −(τ/2)·(A/τ − S)² with A = R − group mean: A·∇log π − τ·S·∇log π. DRO (arXiv 2405.19107) is the same
    with a learned value for the mean. Read in horizon-rl/OpenKimi, openkimi/pmd/core_algos.py (τ .01 is its default). A
    response with A = 0 has no gradient here; there it is still drawn to π_anchor.
    """
    return 1 - tau * ratios.sequence_log_ratio / divisor(ratios.sequence_advantage)
