"""Behaviour policy: what W is the ratio of, and what d compares, in each `behavior` mode."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Compared:
    """The policies that the loss and the metrics compare."""

    ratio: str
    """What φ's W and `vespo/w_*`, `vespo/log_w_*`, `vespo/ess` are of."""
    gap: str
    """What d of `mismatch/*`, and a correction's w, are of."""
    corrects: str
    """What W corrects for."""


BEHAVIORS: dict[str, Compared] = {
    "rollout": Compared("π_θ/μ", "log π_θ − log μ", "staleness and the engines' difference together"),
    "recompute": Compared("π_θ/π_old", "log π_old − log μ", "staleness since the rollout batch began"),
    "version": Compared("π_θ/π_old", "log π_old − log μ", "staleness since each token was drawn"),
}
"""rollout: μ is the engine's log-probs. recompute: π_old by the trainer, of the weights that a rollout batch begins
with. version: π_old by the trainer, of the weights that drew each token."""


def describe(behavior: str) -> str:
    """One line for a console or a report: what W and d compare."""
    compared = BEHAVIORS[behavior]
    return f"{behavior}: W = {compared.ratio} corrects {compared.corrects}; mismatch d = {compared.gap}"
