"""Metrics against direct formulas on whole batches, and what reaches TensorBoard."""

import math

import pytest
import torch

from tests.losses.batches import apart, make_batch
from tests.losses.test_surrogates import run
from vespo_megatron.losses import policy_loss
from vespo_megatron.losses.diagnostics import raw_histogram


def pieces(batch):
    """Direct: per response (A, T, Σd), and d, p, q of unmasked tokens, with d = log π_θ − log μ."""
    d, p, q, rows = [], [], [], []
    for i in range(batch.num_sequences):
        at = ((batch.segment_ids == i) & batch.mask).nonzero().flatten()
        if len(at):
            gap = batch.log_probs[at] - batch.behavior_log_probs[at]
            rows.append((float(batch.advantages[i]), len(at), float(gap.sum())))
            d.append(gap)
            p.append(batch.log_probs[at].exp())
            q.append(batch.behavior_log_probs[at].exp())
    return rows, torch.cat(d), torch.cat(p), torch.cat(q)


def test_mismatch_metrics_equal_their_formulas():
    batch = make_batch(4, probabilities=True)
    found = run(batch, "vespo")[0].metrics.finalize()
    rows, d, p, q = pieces(batch)
    expected = {
        "k1": -d.mean(),
        "k2": (d**2 / 2).mean(),
        "k3": (d.exp() - 1 - d).mean(),
        "chi2_token": ((2 * d).exp() - 1).mean(),
        "extreme_token_fraction": ((d.abs()) > math.log(2)).double().mean(),
        "token_mult_prob_error": d.abs().exp().mean(),
        "prob_diff_mean": (p - q).abs().mean(),
        "prob_diff_max": (p - q).abs().max(),
        "prob_diff_std": (p - q).abs().std(correction=0),
        "prob_correlation": torch.corrcoef(torch.stack([p, q]))[0, 1],
        "log_ppl_diff": sum(-s / t for _, t, s in rows) / len(rows),
        "log_ppl_abs_diff": sum(abs(s / t) for _, t, s in rows) / len(rows),
        "log_ppl_diff_max": max(-s / t for _, t, s in rows),
        "log_ppl_diff_min": min(-s / t for _, t, s in rows),
        "chi2_seq": sum(math.exp(2 * max(min(s, 20), -20)) - 1 for _, _, s in rows) / len(rows),
        "log_ratio_mean": sum(s for _, _, s in rows) / len(rows),
        "log_ratio_std": torch.tensor([s for _, _, s in rows], dtype=torch.float64).std(correction=0),
        "log_ratio_std_expected": (2 * (d.exp() - 1 - d).mean() * sum(t for _, t, _ in rows) / len(rows)).sqrt(),
    }
    assert {n for n in found if n.startswith("mismatch/")} == {f"mismatch/{n}" for n in expected}
    for name, value in expected.items():
        assert found[f"mismatch/{name}"] == pytest.approx(float(value), rel=1e-9), name


@pytest.mark.parametrize("seed", range(8))
def test_a_correlation_is_at_most_one_whatever_rounding_makes_of_its_sums(seed):
    """Engines that agree, at temperatures that leave probabilities close to one another."""
    behavior_log_probs = -1 + 1e-3 * torch.rand(512, generator=torch.Generator().manual_seed(seed))
    log_probs = (behavior_log_probs + 2e-7).requires_grad_()
    output = policy_loss(log_probs, behavior_log_probs, torch.ones(1), torch.tensor([0, 512]), name="vespo")
    found = output.metrics.finalize()
    assert 0.9 < found.get("mismatch/prob_correlation", 1.0) <= 1.0


def test_the_mismatch_is_between_the_training_engine_and_the_rollout_engine_where_both_are_known():
    batch = make_batch(4)
    found = run(batch, "grpo", behavior="recompute")[0].metrics.finalize()
    d = (batch.old_log_probs - batch.behavior_log_probs)[batch.mask]
    assert found["mismatch/k3"] == pytest.approx(float((d.exp() - 1 - d).mean()))


def test_vespo_metrics_equal_their_formulas():
    batch = make_batch(4)
    found = run(batch, "vespo")[0].metrics.finalize()
    rows, _, _, _ = pieces(batch)
    w = [math.exp(s) for _, _, s in rows]
    phi = [
        x**2 * math.exp(3 * (1 - x)) if a >= 0 else x**3 * math.exp(2 * (1 - x))
        for x, (a, _, _) in zip(w, rows, strict=True)
    ]
    n = len(rows)
    positive = [i for i in range(n) if rows[i][0] >= 0]
    negative = [i for i in range(n) if rows[i][0] < 0]
    mean = sum(w) / n
    expected = {
        "approx_kl": sum(-s / t for _, t, s in rows) / n,
        "w_mean": mean,
        "w_max": max(w),
        "w_min": min(w),
        "w_std": math.sqrt(sum((x - mean) ** 2 for x in w) / n),
        "log_w_mean": sum(s for _, _, s in rows) / n,
        "phi_mean": sum(phi) / n,
        "phi_max": max(phi),
        "phi_min": min(phi),
        "ess": sum(w) ** 2 / (n * sum(x * x for x in w)),
        "phi_ess": sum(phi) ** 2 / (n * sum(x * x for x in phi)),
        "implied_c": sum(f * x for f, x in zip(phi, w, strict=True)) / sum(phi),
        "w_mean_positive": sum(w[i] for i in positive) / len(positive),
        "w_mean_negative": sum(w[i] for i in negative) / len(negative),
        "phi_mean_positive": sum(phi[i] for i in positive) / len(positive),
        "phi_mean_negative": sum(phi[i] for i in negative) / len(negative),
        "count_positive": len(positive),
        "count_negative": len(negative),
        "negative_large_w_count": 0,
    }
    for name, value in expected.items():
        assert found[f"vespo/{name}"] == pytest.approx(value, rel=1e-9), name


def test_effective_sample_size_is_of_unclipped_weights_even_where_they_overflow():
    log_probs, behavior = apart(torch.tensor([800.0, 800.0, 0.0, -900.0], dtype=torch.float64))
    output = policy_loss(log_probs, behavior, -torch.ones(4), torch.arange(5), on_bad_sample="error")
    metrics = output.metrics.finalize()
    assert metrics["vespo/ess"] == pytest.approx(0.5)
    assert metrics["vespo/negative_large_w_count"] == 2
    assert metrics["vespo/negative_large_w_max"] == pytest.approx(math.exp(20))
    assert metrics["vespo/negative_large_w_phi_mean"] == 0.0


def test_effective_sample_size_is_not_that_of_clamped_weights():
    log_probs, behavior = apart(torch.tensor([30.0, 25.0, 0.0, 0.0], dtype=torch.float64))
    metrics = policy_loss(log_probs, behavior, -torch.ones(4), torch.arange(5)).metrics.finalize()
    assert metrics["vespo/ess"] == pytest.approx((1 + math.exp(-5)) ** 2 / (4 * (1 + math.exp(-10))))
    assert metrics["vespo/ess_clamped"] == pytest.approx(0.5)


def test_histograms_count_every_response_and_reach_tensorboard():
    batch = make_batch(4)
    metrics = run(batch, "vespo")[0].metrics
    filled = sum(n > 0 for n in batch.unmasked_lengths)
    for name in ("vespo/log_w", "vespo/phi"):
        assert float(metrics.histograms[name][1].sum()) == filled

    for name in ("vespo/log_w", "vespo/phi"):
        values = raw_histogram(*metrics.histograms[name])
        assert len(values["bucket_limits"]) == len(values["bucket_counts"])
        assert sum(values["bucket_counts"]) == values["num"] == filled
    edges, counts = metrics.histograms["vespo/phi"]
    assert raw_histogram(edges, torch.zeros_like(counts)) is None


def test_phi_of_a_token_objective_is_averaged_over_tokens_and_zeros_are_counted():
    batch = make_batch(4)
    output, _ = run(batch, "grpo")
    metrics = output.metrics.finalize()
    phi = output.coefficient[batch.mask]
    assert metrics["vespo/phi_mean"] == pytest.approx(float(phi.mean()))
    assert metrics["vespo/phi_min"] == 0.0 and metrics["vespo/phi_max"] == pytest.approx(float(phi.max()))
    assert metrics["loss/zero_coefficient_fraction"] == pytest.approx(float((phi == 0).double().mean()))
