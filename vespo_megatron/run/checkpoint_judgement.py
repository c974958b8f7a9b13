"""How good a run's checkpoints are, by the run's own record: an evaluation may end long after its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from vespo_megatron.durable import sync
from vespo_megatron.run.checkpoint_store import Judgement
from vespo_megatron.run.metrics_file import METRICS_FILE, evaluated_steps, is_of_an_evaluation, read_metrics


class Record:
    """What `metrics.jsonl` says of each step.

    Args:
        evaluates_after: whether the run's schedule has an evaluation after a step.
    """

    def __init__(self, run_dir: Path, evaluates_after: Callable[[int], bool]) -> None:
        self._run_dir, self._evaluates_after = run_dir, evaluates_after

    def judge(self, metric: str, steps: Collection[int]) -> Judgement:
        """The metric's values after these steps; undecided where the record has not come, or its evaluation has not."""
        rows = {row["step"]: row for row in read_metrics(self._run_dir)}
        values = {step: rows[step][metric] for step in steps if rows.get(step, {}).get(metric) is not None}
        missing = {step for step in steps if step not in rows}
        if is_of_an_evaluation(metric):
            missing |= {step for step in steps if self._evaluates_after(step)} - evaluated_steps(rows.values())
        return Judgement(values, missing)

    def sync(self) -> None:
        """A checkpoint is not to survive what judges it."""
        if (self._run_dir / METRICS_FILE).exists():
            sync(self._run_dir / METRICS_FILE)
