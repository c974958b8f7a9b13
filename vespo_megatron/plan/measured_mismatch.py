"""What a run, or `vespo-megatron mismatch`, has measured of how far the policies are apart, and the φ it had."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.losses.predicted import Divergence
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.metrics_file import METRICS_FILE, read_metrics
from vespo_megatron.run.run_directory import RECIPE_FILE
from vespo_megatron.trainer.mismatch_table import FILE as MISMATCH_FILE

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ResponseLengths:
    """Response lengths in tokens."""

    mean: float
    std: float
    max: float


@dataclass(frozen=True)
class Measured:
    """Divergences per token, of all steps together."""

    engine: Divergence
    """π_old/μ, the engines alone."""
    staleness: Divergence
    """π_θ/π_old, mean over the updates of a rollout batch."""
    source: str
    lengths: ResponseLengths | None = None
    recipe: Recipe | None = None
    """The run's own; None: measured without training."""
    rows: Sequence[Row] = field(default=(), repr=False)
    """Its steps that have a mismatch."""
    notes: tuple[str, ...] = ()


def read_measured(folder: Path, *, replay: str) -> Measured:
    """Read a run directory of `train` or of `mismatch`.

    Args:
        replay: none or R3, which of its two measurements to take from `mismatch`.

    Raises:
        UserError: no such folder, or nothing in it that has measured a mismatch.
    """
    if not folder.is_dir():
        raise UserError("is no folder", where=str(folder), expected="the directory of a run")
    if (folder / METRICS_FILE).exists() and (rows := read_metrics(folder)):
        return _of_run(folder, rows)
    if (folder / MISMATCH_FILE).exists():
        return _of_mismatch(folder / MISMATCH_FILE, replay)
    raise UserError(
        f"has neither a finished step in {METRICS_FILE} nor {MISMATCH_FILE}",
        where=str(folder),
        expected="the directory of a run of vespo-megatron train or mismatch",
    )


def divergence(k3: float, k2: float | None) -> Divergence:
    """Of measured moments: where few tokens give a k2 that no k3 so large can have, k3 alone."""
    k3 = max(k3, 0.0)  # rounding, where two policies are the same
    return Divergence(k3) if k2 is None or 2 * k2 <= k3**2 else Divergence(k3, k2)


def ratio_of_step(row: Row, behavior: str) -> Divergence:
    """Of W in one step of a run."""
    if behavior == "rollout":
        return divergence(row["mismatch/k3"], row.get("mismatch/k2"))
    return divergence(row.get("staleness/k3") or 0.0, None)


def _of_run(folder: Path, every_row: Sequence[Row]) -> Measured:
    rows = [row for row in every_row if row.get("mismatch/k3") is not None]
    if not rows:
        raise UserError(f"no step has mismatch/k3 among {len(every_row)}", where=str(folder / METRICS_FILE))
    if not (folder / RECIPE_FILE).exists():
        raise UserError(f"has no {RECIPE_FILE}, which says what its k3 compares", where=str(folder))
    recipe = load_recipe(folder / RECIPE_FILE)
    k3, k2 = _mean(rows, "mismatch/k3"), _mean_or_none(rows, "mismatch/k2")
    notes: list[str] = []
    if recipe.behavior == "rollout":
        first = _mean_or_none(rows, "mismatch/k3_first_update")
        stale = max(k3 - first, 0.0) if first is not None else 0.0
        engine = divergence(k3 - stale, None if k2 is None else k2 - stale)
        if recipe.grpo.async_grpo.enabled:
            notes.append("its first updates are stale already: what is put down to the engines holds that staleness")
    else:
        found = _mean_or_none(rows, "staleness/k3")
        stale, engine = max(found or 0.0, 0.0), divergence(k3, k2)
        if found is None:
            notes.append("it has no staleness/k3: staleness is taken as 0")
    return Measured(
        engine,
        Divergence(stale),
        f"{folder}, mean of {len(rows)} steps with behavior {recipe.behavior}",
        _lengths(rows),
        recipe,
        rows,
        tuple(notes),
    )


def _of_mismatch(path: Path, replay: str) -> Measured:
    try:
        rows = [row for row in json.loads(path.read_text()) if row["replay"] == replay]
        k3, k2 = _mean(rows, "mismatch/k3"), _mean_or_none(rows, "mismatch/k2")
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"is damaged ({error!r})", where=str(path), fix="run vespo-megatron mismatch again") from None
    return Measured(divergence(k3, k2), Divergence(0.0), f"{path}, mean of {len(rows)} batches, replay {replay}")


def _mean(rows: Sequence[Row], name: str) -> float:
    values = [float(row[name]) for row in rows if row.get(name) is not None]
    return math.fsum(values) / len(values)


def _mean_or_none(rows: Sequence[Row], name: str) -> float | None:
    return _mean(rows, name) if any(row.get(name) is not None for row in rows) else None


def _lengths(rows: Sequence[Row]) -> ResponseLengths | None:
    known = [row for row in rows if row.get("response/length_mean")]
    if not known:
        return None
    mean = _mean(known, "response/length_mean")
    squares = [row["response/length_mean"] ** 2 + (row.get("response/length_std") or 0.0) ** 2 for row in known]
    variance = math.fsum(squares) / len(squares) - mean**2
    longest = max(row.get("response/length_max") or row["response/length_mean"] for row in known)
    return ResponseLengths(mean, math.sqrt(max(variance, 0.0)), longest)
