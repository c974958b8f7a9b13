"""`metrics.jsonl`: an object of JSON per step, and one more for what is known of a step later.

Lines of the same step are one: what ends beside training (an evaluation) adds to the step it belongs to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """The one writer of a run's file, opened to go on after `start_step`; later steps in it are dropped, all for 0.

    Lines that the disk has no room for wait in memory, in their order, and are written before the next.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        path = run_dir / METRICS_FILE
        kept = [record for record in read_metrics(run_dir) if start_step and record["step"] <= start_step]
        if path.exists():
            fresh = path.with_suffix(".tmp")
            fresh.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            fresh.replace(path)
        self.seconds = kept[-1].get("wall_time", 0.0) if kept else 0.0
        """That the run had taken."""
        self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []

    def append(self, record: Mapping[str, Any]) -> None:
        """A line more, in the file when this returns. Raises OSError where there is no room: the line waits."""
        self._waiting.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._write()

    def _write(self) -> None:
        while self._waiting:
            whole = os.fstat(self._file.fileno()).st_size
            line = self._waiting[0]
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(whole)  # a line is there or it is not
                raise
            del self._waiting[0]

    @property
    def waiting(self) -> int:
        """Lines that are not in the file."""
        return len(self._waiting)

    def close(self) -> None:
        """Try once more to write what waits. Raises OSError when it is lost."""
        try:
            self._write()
        finally:
            self._file.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The steps in a run's `metrics.jsonl`, in order; empty when there is none.

    A last line cut short by a crash is left out, and of a number that a step has twice the later one holds.
    """
    path = Path(run_dir) / METRICS_FILE
    records: dict[int, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.setdefault(record["step"], {}).update(record)
    return [records[step] for step in sorted(records)]


def is_of_an_evaluation(metric: str) -> bool:
    """Whether a metric is known once an evaluation has ended, which may be later than its step."""
    return metric.startswith("eval/")


def evaluated_steps(rows: Iterable[Mapping[str, Any]]) -> set[int]:
    """The steps among `rows` whose evaluation has ended and is there."""
    return {row["step"] for row in rows if any(map(is_of_an_evaluation, row))}
