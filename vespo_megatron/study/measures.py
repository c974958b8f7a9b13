"""What runs of a study are measured by, besides their accuracy."""

from __future__ import annotations

LATE = {
    "reward": "reward/mean",
    "w_mean": "vespo/w_mean",
    "ess": "vespo/ess",
    "k3": "mismatch/k3",
    "route_agreement": "routes/agreement",
    "entropy": "policy/entropy",
    "response_length": "response/length_mean",
    "grad_norm": "loss/grad_norm",
    "lag_mean": "staleness/lag_mean",
}
"""Columns that are a metric's mean over the last quarter of a run's steps."""

RATIOS = ("k3", "grad_norm")
"""Those that are compared as ratios: positive, and of any order of magnitude."""
