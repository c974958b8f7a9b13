"""What runs are measured by, besides their accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LATE = {
    "reward": "reward/mean",
    "w_mean": "vespo/w_mean",
    "ess": "vespo/ess",
    "k3": "mismatch/k3",
    "k3_engines": "mismatch/k3_first_update",
    "width": "mismatch/log_ratio_std",
    "width_expected": "mismatch/log_ratio_std_expected",
    "route_agreement": "routes/agreement",
    "entropy": "policy/entropy",
    "response_length": "response/length_mean",
    "grad_norm": "loss/grad_norm",
    "lag_mean": "staleness/lag_mean",
}
"""Columns that are a metric's mean over the last quarter of a run's steps."""

RATIOS = ("k3", "k3_engines", "width", "width_expected", "grad_norm")
"""Those that are compared as ratios: positive, and of any order of magnitude."""


EXPECTED = {"width": "width_expected"}
"""Measure → the one that says what a formula makes of it."""


def late_mean(history: Sequence[Mapping[str, Any]], metric: str) -> float:
    """Mean over the last quarter of a run's steps; NaN where none of them has the metric."""
    steps = [record for record in history if record["step"] > 0]
    values = [record[metric] for record in steps[-max(1, len(steps) // 4) :] if record.get(metric) is not None]
    return math.fsum(values) / len(values) if values else math.nan


def by_layer(history: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[int, float]:
    """`late_mean` of the metrics whose names end in a layer's number, by that number."""
    means = {int(name.rsplit("_", 1)[1]): late_mean(history, name) for name in metrics}
    return {layer: value for layer, value in sorted(means.items()) if not math.isnan(value)}
