"""Metrics of a step's optimizer updates, over updates and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vespo_megatron.losses import MetricSums
from vespo_megatron.megatron.parallel import RankInfo, data_context_parallel_group
from vespo_megatron.megatron.policy import UpdateResult
from vespo_megatron.metrics.merging import merge_rows
from vespo_megatron.metrics.table import Merge, metric
from vespo_megatron.trainer.objective import Objective
from vespo_megatron.trainer.scatter import Scatter


def taken(results: Sequence[UpdateResult]) -> Sequence[UpdateResult]:
    """The updates whose metrics count: those that were taken; the last one where all were refused."""
    return [result for result in results if result.succeeded] or results[-1:]


def reduce_updates(
    results: Sequence[UpdateResult], objective: Objective, rank_info: RankInfo, scatter: Scatter
) -> dict[str, Any]:
    """Metrics of the updates that were taken, over all ranks; complete on rank 0, empty elsewhere. A collective."""
    overflows = sum(result.overflowed for result in results)
    skipped = sum(not result.succeeded for result in results) - overflows
    last = results[-1]
    scale = {} if last.loss_scale is None else {"loss/scale": last.loss_scale, "loss/overflows": float(overflows)}
    results = taken(results)
    merged: dict[str, float] = {}
    histograms: dict[str, Any] = {}
    if rank_info.is_last_stage:
        group = data_context_parallel_group()
        per_update = [objective.metrics(result.reports).all_reduce(group) for result in results]
        finished = [sums.finalize() for sums in per_update]
        whole = sum(per_update, start=MetricSums())
        merged = whole.finalize() | first_and_last(finished)
        histograms = {name: (edges, counts.cpu()) for name, (edges, counts) in whole.histograms.items()}
    report = (merged, histograms) if rank_info.reports and merged else None
    reports = [report for report in scatter.to_rank_zero(report) if report]
    if not reports:
        return {}
    merged, histograms = reports[0]
    # Shares of an update add up to its value; where updates are averaged, their sum is divided once more.
    averaged = [name for name in merged if metric(name).shares and metric(name).merge is Merge.MEAN]
    return (
        merged
        | {name: merged[name] / len(results) for name in averaged}
        | merge_rows(
            [
                {
                    "loss/grad_norm": result.grad_norm,
                    "loss/grad_norm_max": result.grad_norm,
                    "loss/updates": float(result.succeeded),
                }
                for result in results
            ]
        )
        | {"loss/skipped_updates": float(skipped), "loss/learning_rate": last.learning_rate, "histograms": histograms}
        | scale
    )


def first_and_last(per_update: Sequence[dict[str, float]]) -> dict[str, float]:
    """What staleness does inside a rollout batch: W, φ, ESS and k3 of its first and last update."""
    if len(per_update) < 2:
        return {}
    names = ("vespo/w_mean", "vespo/phi_mean", "vespo/ess", "mismatch/k3")
    return {
        f"{name}_{which}_update": metrics[name]
        for which, metrics in (("first", per_update[0]), ("last", per_update[-1]))
        for name in names
        if name in metrics
    }
