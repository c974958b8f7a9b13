"""What a study's runs came to: a row of numbers for each, from `metrics.jsonl`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vespo_megatron.run.metrics_file import read_metrics
from vespo_megatron.run.records import SUMMARY_FILE
from vespo_megatron.study.measures import LATE, late_mean
from vespo_megatron.study.spec import Cell, Study

COLLAPSE = "its held-out accuracy at the end is below half of the best the run had"


@dataclass(frozen=True)
class Outcome:
    """One run."""

    cell: Cell
    state: str
    """'finished', 'unfinished' or 'not begun'."""
    history: list[dict[str, Any]]
    accuracy: float
    """Held-out, of a finished run: the mean of the study's `last_evaluations`; NaN otherwise."""
    best: float
    seconds: float
    late: dict[str, float]

    @property
    def steps(self) -> int:
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def collapsed(self) -> bool:
        """See `COLLAPSE`."""
        return self.state == "finished" and self.accuracy < 0.5 * self.best

    def series(self, metric: str) -> dict[int, float]:
        """Value by step."""
        return {record["step"]: record[metric] for record in self.history if record.get(metric) is not None}


def read_outcomes(study: Study) -> list[Outcome]:
    """Every cell's, in the study's order; runs in progress are read as far as they are."""
    return [_outcome(study, cell) for cell in study.cells()]


def cells_csv(study: Study, outcomes: Sequence[Outcome]) -> str:
    """A row per run."""
    rows = []
    for outcome in outcomes:
        row: dict[str, Any] = dict(zip(study.axes, outcome.cell.levels, strict=True))
        row |= {"seed": outcome.cell.seed, "state": outcome.state, "steps": outcome.steps}
        row |= {"accuracy": outcome.accuracy, "best": outcome.best, "collapsed": int(outcome.collapsed)}
        row |= outcome.late | {"seconds": outcome.seconds}
        rows.append({name: _cell_text(value) for name, value in row.items()})
    return _csv(rows)


def curves_csv(study: Study, outcomes: Sequence[Outcome]) -> str:
    """A row per run and step."""
    rows = []
    for outcome in outcomes:
        for record in outcome.history:
            row: dict[str, Any] = dict(zip(study.axes, outcome.cell.levels, strict=True))
            row |= {"seed": outcome.cell.seed, "step": record["step"]}
            values = {"accuracy": study.accuracy, **LATE}
            row |= {column: _cell_text(record.get(metric)) for column, metric in values.items()}
            rows.append(row)
    return _csv(rows)


def _outcome(study: Study, cell: Cell) -> Outcome:
    folder = study.folder(cell)
    history = read_metrics(folder) if folder.is_dir() else []
    finished = (folder / SUMMARY_FILE).exists()
    evaluations = [record[study.accuracy] for record in history if record.get(study.accuracy) is not None]
    last = evaluations[-study.last_evaluations :]
    seconds = json.loads((folder / SUMMARY_FILE).read_text())["seconds"] if finished else math.nan
    return Outcome(
        cell=cell,
        state="finished" if finished else "unfinished" if history else "not begun",
        history=history,
        accuracy=math.fsum(last) / len(last) if finished and last else math.nan,
        best=max(evaluations, default=math.nan),
        seconds=seconds,
        late={column: late_mean(history, metric) for column, metric in LATE.items()},
    )


def _cell_text(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return "" if value is None else value


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
