"""Objectives that look at a whole mini-batch before its first token: BAPO, M2PO, Clip-Cov and KL-Cov.

Each has a search (`losses/search.py`) that finds what holds for the mini-batch, however it is cut; as a library call
without it they look at the tokens of the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vespo_megatron.losses.bapo import BoundSearch
from vespo_megatron.losses.covariance import ClipSearch, CovarianceSearch, covariance
from vespo_megatron.losses.objectives.parts import bounded_for_negatives, clipped_ratio, divisor
from vespo_megatron.losses.ratios import Ratios
from vespo_megatron.losses.registry import objective
from vespo_megatron.losses.search import on_call
from vespo_megatron.losses.second_moment import SecondMomentSearch


@objective("bapo", level="token", aggregation="token-mean", source="arXiv 2510.18927", search=BoundSearch)
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
    are given; give `ratio_low` and `ratio_high` (from `BoundSearch.found` on the mini-batch's summed
    `BoundSearch.contributions`) for a result that does not depend on how the mini-batch is split.
    """
    if ratio_low is None or ratio_high is None:
        search = BoundSearch(target_share, low_start, low_max, low_step, high_start, high_max, high_step)
        found = on_call(search, ratios)
        ratio_low, ratio_high = found["ratio_low"], found["ratio_high"]
    return clipped_ratio(ratios.log_ratio, ratios.token_advantage, ratio_low, ratio_high, dual_clip)


@objective(
    "m2po",
    level="token",
    aggregation="token-mean",
    source="arXiv 2510.01161",
    search=SecondMomentSearch,
)
def m2po(
    ratios: Ratios,
    *,
    m2_threshold: float = SecondMomentSearch.m2_threshold,
    m2_max: float | Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 3.0,
) -> Tensor:
    """GRPO's φ on tokens with (log ρ)² ≤ m2_max, else 0: [tokens]. M2PO (arXiv 2510.01161).

    m2_max is the largest for which the mean of (log ρ)² over the tokens that are kept is below `m2_threshold`: the
    tokens that have moved most go first. Read in AReaL, areal/trainer/ppo/actor.py (_get_m2po_loss_mask), which masks
    by log μ − log π_prox. The paper was not read: the default threshold is ours.
    """
    if m2_max is None:
        m2_max = on_call(SecondMomentSearch(m2_threshold), ratios)["m2_max"]
    kept = ratios.log_ratio.square() <= m2_max
    clipped = clipped_ratio(ratios.log_ratio, ratios.token_advantage, 1 - clip_low, 1 + clip_high, dual_clip)
    return torch.where(kept, clipped, 0.0)


@objective(
    "clip_cov",
    level="token",
    aggregation="token-mean",
    source="arXiv 2505.22617",
    search=ClipSearch,
)
def clip_cov(
    ratios: Ratios,
    *,
    share: float = ClipSearch.share,
    cov_low: float = ClipSearch.cov_low,
    cov_high: float = ClipSearch.cov_high,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 3.0,
    mean_advantage: float | Tensor | None = None,
    mean_log_prob: float | Tensor | None = None,
    lot_max: float | Tensor | None = None,
) -> Tensor:
    """GRPO's φ, 0 on a small random share of tokens of high covariance: [tokens]. Clip-Cov (arXiv 2505.22617).

    cov = (A − mean A)·(log π − mean log π). Of the tokens with cov_low < cov < cov_high that the clip leaves, `share`
    of all tokens (at least one) are drawn by lot. Read in verl, compute_policy_loss_clip_cov; its lots are
    torch.randperm's, ours are made of the token's own numbers, so that they do not depend on how the batch is cut.
    """
    search = ClipSearch(share, cov_low, cov_high, clip_low, clip_high)
    if mean_advantage is None or mean_log_prob is None or lot_max is None:
        found = on_call(search, ratios)
        mean_advantage, mean_log_prob, lot_max = (found[name] for name in search.finds)
    columns = search.columns(ratios)
    drawn = search.candidates(columns, mean_advantage, mean_log_prob) & (columns[3] <= lot_max)
    clipped = clipped_ratio(ratios.log_ratio, ratios.token_advantage, 1 - clip_low, 1 + clip_high, dual_clip)
    return torch.where(drawn, 0.0, clipped)


@objective(
    "kl_cov",
    level="token",
    aggregation="token-mean",
    source="arXiv 2505.22617",
    search=CovarianceSearch,
)
def kl_cov(
    ratios: Ratios,
    *,
    share: float = CovarianceSearch.share,
    kl_coefficient: float = 1.0,
    ratio_max: float | None = 20.0,
    mean_advantage: float | Tensor | None = None,
    mean_log_prob: float | Tensor | None = None,
    cov_min: float | Tensor | None = None,
) -> Tensor:
    """ρ, less a pull back to π_anchor on the tokens of the highest covariance: [tokens]. KL-Cov (arXiv 2505.22617).

    On the `share` of tokens (at least one) whose (A − mean A)·(log π − mean log π) is highest, the loss has
    kl_coefficient·|log ρ| besides: φ = ρ − kl_coefficient·sign(log ρ)/A. There is no clip. Read in verl,
    compute_policy_loss_kl_cov. `ratio_max`: no gradient where A < 0 and ρ is above it (verl has no bound).
    """
    if mean_advantage is None or mean_log_prob is None or cov_min is None:
        search = CovarianceSearch(share)
        found = on_call(search, ratios)
        mean_advantage, mean_log_prob, cov_min = (found[name] for name in search.finds)
    advantage, ratio = ratios.token_advantage, ratios.log_ratio.exp()
    phi = bounded_for_negatives(ratio, ratio, advantage, ratio_max)
    pull = kl_coefficient * ratios.log_ratio.sign() / divisor(advantage)
    high = covariance(advantage, ratios.log_probs, mean_advantage, mean_log_prob) >= cov_min
    return torch.where(high, phi - pull, phi)
