"""What W, φ and the mismatch between trainer and engine look like, as `MetricSums`.

Per-sequence metrics (`vespo/*` but φ of token objectives, `mismatch/log_ppl_*`, `mismatch/chi2_seq`, `mismatch/ess*`)
come from sums that every context parallel rank holds, and only the first rank reports them. Per-token metrics
(`mismatch/k*`, …) are each rank's own. `metrics.table` says what each is over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vespo_megatron.losses.metrics import MetricSums
from vespo_megatron.metrics.table import metric

if TYPE_CHECKING:
    from vespo_megatron.losses.corrected_ratios import CorrectedRatios

EXTREME_TOKEN = 2.0
"""τ of the extreme-token fraction F(τ)."""
LARGE_W = 100.0
"""Negatives with W above this are counted apart, as the reference does."""
LOG_W_EDGES = tuple(-20 + 40 * i / 80 for i in range(81))
PHI_EDGES = tuple(3 * i / 60 for i in range(61))
CHUNK_TOKENS = 1 << 18
"""Per-token metrics go through this many tokens at a time: their temporaries stay small."""


@dataclass(frozen=True)
class SequenceView:
    """What per-sequence metrics are made of; every tensor [num_sequences], complete over context parallelism."""

    log_w: Tensor
    """Σ log π_θ/π_anchor, unclamped and without corrections: the W that φ sees."""
    length: Tensor
    """T"""
    advantage: Tensor
    phi: Tensor | None
    """φ of a sequence objective."""
    mismatch: Tensor
    """Σ d, d = log π_train − log μ; π_train is π_old where it is known, else π_θ."""
    keep: Tensor
    """bool: not dropped for numbers that are not finite, and not empty."""


def sequence_metrics(view: SequenceView) -> MetricSums:
    """Per-sequence metrics of one micro-batch, before any reduction."""
    metrics = MetricSums()
    f64 = torch.float64
    keep = view.keep
    count = keep.sum().to(f64)

    def mean(name: str, values: Tensor, where: Tensor = keep) -> None:
        metrics.add(name, torch.where(where, values, 0.0).sum(dtype=f64), where.sum())

    def extremes(name: str, values: Tensor, where: Tensor = keep) -> None:
        values = values.to(f64)
        if values.numel():
            metrics.maxima[f"{name}_max"] = torch.where(where, values, -torch.inf).max()
            metrics.minima[f"{name}_min"] = torch.where(where, values, torch.inf).min()

    log_w = torch.where(keep, view.log_w, 0.0).to(f64)
    w = log_w.clamp(-20, 20).exp()
    length = view.length.clamp(min=1)
    mean("vespo/approx_kl", -view.log_w / length)
    for name, values in (("w", w), ("log_w", log_w)):
        mean(f"vespo/{name}_mean", values)
        extremes(f"vespo/{name}", values)
    mean("_w_square", w**2)
    # Unclamped weights overflow long before their ratio does: both sums stay logarithms.
    nothing = log_w.new_full((1,), -torch.inf)
    for factor, name in ((1.0, "_log_sum_w"), (2.0, "_log_sum_w_square")):
        terms = torch.where(keep, factor * log_w, -torch.inf)
        metrics.log_sums[name] = torch.logsumexp(torch.cat([terms, nothing]), 0)
    metrics.add("_sequences", count, 1.0)
    positive = view.advantage >= 0
    groups = (("positive", keep & positive), ("negative", keep & ~positive))
    for sign, where in groups:
        mean(f"vespo/w_mean_{sign}", w, where)
        metrics.add(f"vespo/count_{sign}", where.sum(), 0.0)
    large = keep & ~positive & (log_w > math.log(LARGE_W))
    metrics.add("vespo/negative_large_w_count", large.sum(), 0.0)
    metrics.maxima["vespo/negative_large_w_max"] = torch.cat([torch.where(large, w, -torch.inf), nothing]).max()
    metrics.histograms["vespo/log_w"] = (LOG_W_EDGES, histogram(log_w, keep, LOG_W_EDGES))
    if view.phi is not None:
        phi = view.phi.to(f64)
        mean("vespo/phi_mean", phi)
        mean("_phi_square", phi**2)
        mean("_phi_w", phi * w)
        extremes("vespo/phi", phi)
        for sign, where in groups:
            mean(f"vespo/phi_mean_{sign}", phi, where)
        mean("vespo/negative_large_w_phi_mean", phi, large)
        metrics.histograms["vespo/phi"] = (PHI_EDGES, histogram(phi, keep, PHI_EDGES))
    gap = torch.where(keep, view.mismatch, 0.0).to(f64)
    difference = -gap / length
    mean("mismatch/log_ppl_diff", difference)
    mean("mismatch/log_ppl_abs_diff", difference.abs())
    extremes("mismatch/log_ppl_diff", difference)
    mean("mismatch/chi2_seq", torch.exp(2 * gap.clamp(-20, 20)) - 1)
    mean("mismatch/log_ratio_mean", gap)
    mean("_log_ratio_square", gap**2)
    mean("_length", length)
    return metrics


def correction_metrics(corrected: CorrectedRatios, bad: Tensor) -> MetricSums:
    """What a correction did to one micro-batch; `bad [num_sequences]` are left out."""
    metrics = MetricSums()
    some = ~bad & (corrected.lengths > 0)
    tokens = torch.where(some, corrected.lengths, 0.0)
    alone = torch.where(some, corrected.ratios.lengths, 0.0)  # without what is dropped token by token
    metrics.add("correction/dropped_token_fraction", (tokens - alone).sum(), tokens.sum())
    keep = corrected.sequence_weights.keep
    whole = torch.zeros_like(some) if keep is None else some & ~keep
    metrics.add("correction/dropped_response_fraction", whole.sum(), some.sum())
    if corrected.weight_sum is not None and corrected.weight_count is not None:
        metrics.add("correction/weight_mean", corrected.weight_sum, corrected.weight_count)
    return metrics


def moved_metrics(log_probs: Tensor, old_log_probs: Tensor, valid: Tensor | None) -> MetricSums:
    """How far the updates have moved π_θ from π_old: log-probs [tokens], `valid` as in `token_metrics`."""
    metrics = MetricSums()
    total = torch.zeros((), dtype=torch.float64, device=log_probs.device)
    for start in range(0, len(log_probs), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        x = (log_probs[part] - old_log_probs[part]).clamp_(-20, 20)
        x = x if valid is None else torch.where(valid[part], x, 0.0)
        total += (torch.expm1(x) - x).sum(dtype=torch.float64)
    metrics.add("staleness/k3", total, float(len(log_probs)) if valid is None else valid.sum())
    return metrics


def token_metrics(
    train_log_probs: Tensor,
    behavior_log_probs: Tensor,
    valid: Tensor | None,
    phi: Tensor | None,
    coefficient: Tensor | None,
) -> MetricSums:
    """Per-token metrics of this rank's tokens.

    Args:
        train_log_probs: [tokens], log π_old where it is known, else log π_θ.
        behavior_log_probs: [tokens], log μ.
        valid: bool [tokens]; None: all.
        phi: [tokens], φ of a token objective; None for a sequence objective.
        coefficient: [tokens], φ with corrections and masks; None where it is not per token.
    """
    total = MetricSums()
    scratch = train_log_probs.new_empty(3, min(CHUNK_TOKENS, len(train_log_probs)))
    for start in range(0, max(len(train_log_probs), 1), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        valid_here, phi_here, coefficient_here = (None if t is None else t[part] for t in (valid, phi, coefficient))
        total = total + _token_chunk(
            train_log_probs[part], behavior_log_probs[part], valid_here, phi_here, coefficient_here, scratch
        )
    return total


def _token_chunk(
    train: Tensor,
    behavior: Tensor,
    valid: Tensor | None,
    phi: Tensor | None,
    coefficient: Tensor | None,
    scratch: Tensor,
) -> MetricSums:
    """`token_metrics` of one chunk; `scratch [3, ≥ tokens]` is overwritten (fresh memory costs more than the sums)."""
    metrics = MetricSums()
    d, p, q = scratch[:, : len(train)]
    masked: Tensor | float = 0.0
    if valid is None:
        count = torch.tensor(float(len(train)), dtype=torch.float64)
    else:
        count, masked = valid.sum(), (~valid).sum()
        zero = train.new_zeros(())
        train, behavior = torch.where(valid, train, zero, out=p), torch.where(valid, behavior, zero, out=q)

    def mean(name: str, total: Tensor) -> None:
        metrics.add(name, total, count)

    def top(name: str, values: Tensor) -> None:
        largest = values.amax() if values.numel() else values.new_tensor(-torch.inf)
        metrics.maxima[name] = largest.to(torch.float64)

    # Where a token is masked both log-probs are 0, hence d = 0, e^|d| = 1 and p = q = 1.
    torch.sub(train, behavior, out=d).clamp_(-20, 20)
    torch.clamp(train, max=0, out=p).exp_()
    torch.clamp(behavior, max=0, out=q).exp_()
    wide_p, wide_q = (
        p.double(),
        q.double(),
    )  # variances are differences of these sums, near to nothing where p are alike
    for name, total in (
        ("_p", wide_p.sum() - masked),
        ("_q", wide_q.sum() - masked),
        ("_pp", torch.dot(wide_p, wide_p) - masked),
        ("_qq", torch.dot(wide_q, wide_q) - masked),
        ("_pq", torch.dot(wide_p, wide_q) - masked),
    ):
        mean(name, total)
    p.sub_(q).abs_()
    mean("mismatch/prob_diff_mean", p.sum())
    mean("_prob_diff_square", torch.dot(p, p))
    top("mismatch/prob_diff_max", p)
    sum_d = d.sum()
    mean("mismatch/k1", -sum_d)
    mean("mismatch/k2", torch.dot(d, d) / 2)
    growth = torch.expm1(d, out=p)
    sum_growth = growth.sum()
    # Σ (e^d − 1 − d) term by term: the difference of the two sums would be mostly rounding.
    mean("mismatch/k3", torch.sub(growth, d, out=q).sum())
    # e^2d − 1 = (e^d − 1)² + 2(e^d − 1)
    mean("mismatch/chi2_token", torch.dot(growth, growth).to(torch.float64) + 2 * sum_growth)
    d.abs_()
    mean("mismatch/extreme_token_fraction", (d > math.log(EXTREME_TOKEN)).sum())
    # e^|d| = 1 + (e^|d| − 1)
    mean("mismatch/token_mult_prob_error", d.expm1_().sum().to(torch.float64) + count)
    if phi is not None:
        kept = phi if valid is None else torch.where(valid, phi, 0.0)
        mean("vespo/phi_mean", kept.sum(dtype=torch.float64))
        mean("_phi_square", torch.dot(kept, kept))
        top("vespo/phi_max", kept)
        lowest = phi if valid is None else torch.where(valid, phi, torch.inf)
        top("_negative_phi_min", -lowest)
        keep = torch.ones_like(phi, dtype=torch.bool) if valid is None else valid
        metrics.histograms["vespo/phi"] = (PHI_EDGES, histogram(phi, keep, PHI_EDGES))
    if coefficient is not None:
        zero = coefficient == 0 if valid is None else (coefficient == 0) & valid
        mean("loss/zero_coefficient_fraction", zero.sum())
    return metrics


def histogram(values: Tensor, where: Tensor, edges: tuple[float, ...]) -> Tensor:
    """Counts of equal bins between the first and the last edge, values beyond put in the end bins: float64 [bins]."""
    bins = len(edges) - 1
    index = ((values.detach() - edges[0]) * (bins / (edges[-1] - edges[0]))).nan_to_num(0.0, bins - 1.0, 0.0)
    index = index.clamp(0, bins - 1).to(torch.int64)
    counts = torch.zeros(bins, dtype=torch.float64, device=values.device)
    return counts.scatter_add_(0, index, where.to(torch.float64))


def finalize(metrics: MetricSums) -> dict[str, float]:
    """Global sums to public metrics; names that start with an underscore are parts and do not appear."""
    pairs, others = metrics.to_floats()
    out: dict[str, float] = {}
    for name, (total, count) in pairs.items():
        if name.startswith("_"):
            continue
        if metric(name).shares:
            out[name] = total
        elif count > 0:
            out[name] = total / count
    out.update({n: v for n, v in others.items() if not n.startswith("_") and math.isfinite(v)})
    if math.isfinite(others.get("_negative_phi_min", math.inf)):
        out["vespo/phi_min"] = -others["_negative_phi_min"]

    def mean(name: str) -> float:
        total, count = pairs.get(name, (0.0, 0.0))
        return total / count if count else math.nan

    if "vespo/w_mean" in out:
        out["vespo/w_std"] = math.sqrt(max(mean("_w_square") - out["vespo/w_mean"] ** 2, 0.0))
        count = pairs["_sequences"][0]
        if count and math.isfinite(others["_log_sum_w"]):
            out["vespo/ess"] = math.exp(2 * others["_log_sum_w"] - others["_log_sum_w_square"]) / count
        if mean("_w_square") > 0:
            out["vespo/ess_clamped"] = out["vespo/w_mean"] ** 2 / mean("_w_square")
    if "mismatch/log_ratio_mean" in out:
        variance = mean("_log_ratio_square") - out["mismatch/log_ratio_mean"] ** 2
        out["mismatch/log_ratio_std"] = math.sqrt(max(variance, 0.0))
    if "mismatch/k3" in out and mean("_length") > 0:
        out["mismatch/log_ratio_std_expected"] = math.sqrt(2 * max(out["mismatch/k3"], 0.0) * mean("_length"))
    for name in [name for name in out if name.startswith("staleness/w_mean_lag_")]:
        lag = name.rpartition("_")[2]
        if (square := mean(f"_w_square_lag_{lag}")) > 0:
            out[f"staleness/ess_lag_{lag}"] = out[name] ** 2 / square
    if "_phi_square" in pairs and mean("_phi_square") > 0:
        out["vespo/phi_ess"] = out["vespo/phi_mean"] ** 2 / mean("_phi_square")
    if "_phi_w" in pairs and out.get("vespo/phi_mean", 0.0) > 0:
        out["vespo/implied_c"] = mean("_phi_w") / out["vespo/phi_mean"]
    if "_p" in pairs and pairs["_p"][1]:
        out["mismatch/prob_diff_std"] = math.sqrt(
            max(mean("_prob_diff_square") - out["mismatch/prob_diff_mean"] ** 2, 0.0)
        )
        variance_p = mean("_pp") - mean("_p") ** 2
        variance_q = mean("_qq") - mean("_q") ** 2
        if variance_p > 0 and variance_q > 0:
            covariance = mean("_pq") - mean("_p") * mean("_q")
            out["mismatch/prob_correlation"] = max(-1.0, min(1.0, covariance / math.sqrt(variance_p * variance_q)))
    return out


def raw_histogram(edges: Sequence[float], counts: Tensor) -> dict[str, Any] | None:
    """A histogram (log W, φ) as TensorBoard's `histogram_raw` takes it, from counts alone; None of nothing.

    Args:
        edges: of the bins, [bins + 1].
        counts: float64 [bins].
    """
    in_bins = counts.tolist()
    if not sum(in_bins):
        return None
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    return {
        "min": edges[0],
        "max": edges[-1],
        "num": sum(in_bins),
        "sum": sum(count * middle for count, middle in zip(in_bins, middles, strict=True)),
        "sum_squares": sum(count * middle * middle for count, middle in zip(in_bins, middles, strict=True)),
        "bucket_limits": list(edges[1:]),
        "bucket_counts": in_bins,
    }
