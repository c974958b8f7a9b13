"""What a run leaves behind and shows meanwhile: `metrics.jsonl`, TensorBoard, samples to read, a progress bar.

Only global rank 0 makes a `RunLogger`. In the run directory::

    metrics.jsonl    see `run/metrics_file.py`; resuming drops the steps after the checkpoint
    tensorboard/     the same numbers as scalars, and histograms
    samples/         step_<n>.jsonl and the same as step_<n>.md
    evaluations/     step_<n>.jsonl: every problem with its responses' rewards and answers
    summary.json     first and last values of what matters, times, versions

Where the disk is full, records are lost and training goes on (`run/best_effort.py`).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vespo_megatron.evaluation.record import write_problems
from vespo_megatron.evaluation.scores import Problem
from vespo_megatron.metrics.table import metric
from vespo_megatron.run.best_effort import BestEffort
from vespo_megatron.run.metrics_file import METRICS_FILE, MetricsFile, read_metrics
from vespo_megatron.run.tensorboard_events import Histogram, TensorBoardEvents

SUMMARY_FILE = "summary.json"

PROGRESS_METRICS: tuple[tuple[str, str, str], ...] = (
    ("reward/mean", "reward", ".3f"),
    ("vespo/w_mean", "W", ".3f"),
    ("vespo/phi_mean", "φ", ".3f"),
    ("vespo/ess", "ESS", ".2f"),
    ("throughput/tokens_per_second", "tok/s", ",.0f"),
    ("eval/response_length_mean", "eval tokens", ".1f"),
)
"""Metric, its label in the progress bar, and its format."""


@dataclass(frozen=True)
class LoggedSample:
    """One response as it is written to `samples/`."""

    prompt: str
    response: str
    reward: float
    ground_truth: str = ""
    finish_reason: str = ""
    prompt_id: str = ""


def is_score(name: str) -> bool:
    """Whether a metric is the score of a whole validation set: `eval/<set>/avg@<k>` or `eval/<set>/greedy`."""
    return name.startswith("eval/") and ("/avg@" in name or name.endswith("/greedy"))


def is_told_at_the_end(name: str) -> bool:
    """Whether a run's last lines say where a metric began and ended."""
    in_groups = name.startswith("eval/") and ("/by/" in name or "/greedy_by/" in name)
    return name in ("reward/mean", "eval/response_length_mean") or is_score(name) or in_groups


def to_number(value: Any) -> float | int | None:
    """A Python number for JSON; None for what is not finite, since JSON has no NaN. Takes 0-d tensors and arrays."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


class RunLogger:
    """Writes one run's record and shows its progress.

    Args:
        run_dir: the run directory; made if need be.
        total_steps: steps the run will take, for the progress bar.
        tensorboard: write TensorBoard events.
        progress: show a bar where `stream` is a terminal; elsewhere each step is one plain line.
        start_step: the step a resumed run continues after; later lines of `metrics.jsonl` are dropped.
        stream: where progress goes; None is standard error.

    It is a context manager; `close` is idempotent and safe in the middle of a step.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        tensorboard: bool = True,
        progress: bool = True,
        start_step: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.total_steps = total_steps
        self._stream = stream or sys.stderr
        self._metrics = MetricsFile(self.run_dir, start_step)
        self._started = time.monotonic() - self._metrics.seconds  # a resumed run's time goes on
        self._tensorboard = TensorBoardEvents(self.run_dir / "tensorboard", start_step) if tensorboard else None
        self._best_effort = BestEffort(self.print)
        self._bar = self._open_bar(start_step) if progress and self._stream.isatty() else None
        self._closed = False

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        """Every step logged so far, those before a resume included: read again, as a long run's would fill memory."""
        return read_metrics(self.run_dir)

    def log_step(
        self, step: int, metrics: Mapping[str, Any], *, histograms: Mapping[str, Histogram] | None = None
    ) -> None:
        """Record one step (one rollout batch, or an evaluation before the first one as step 0).

        Args:
            step: rises from call to call.
            metrics: `area/name` → number, 0-d tensor or array; what is not finite is written as null.
            histograms: `area/name` → (edges, counts); to TensorBoard alone.

        Raises:
            UserError: a name that the table of metrics does not have; nothing is written.
        """
        for name in (*metrics, *(histograms or {})):
            metric(name)
        record: dict[str, Any] = {"step": step, "wall_time": round(time.monotonic() - self._started, 3)}
        record.update({name: to_number(value) for name, value in metrics.items()})
        self._write(record, histograms or {})
        self._show(step, record)

    def log_late(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add to a step that was logged before: `area/name` → number. Raises as `log_step` does."""
        for name in metrics:
            metric(name)
        self._write({"step": step} | {name: to_number(value) for name, value in metrics.items()}, {})
        self.print(f"of step {step}: " + " · ".join(_scores(metrics)))

    def _write(self, record: Mapping[str, Any], histograms: Mapping[str, Histogram]) -> None:
        with self._best_effort.writing(METRICS_FILE, "its lines wait in memory, training goes on"):
            self._metrics.append(record)
        if self._tensorboard is not None:
            with self._best_effort.writing("TensorBoard's events"):
                self._tensorboard.write(record, histograms)

    def log_samples(self, step: int, samples: Iterable[LoggedSample], *, name: str = "") -> Path:
        """Write some responses as JSON lines and as markdown; `name` sets evaluations apart. Returns the markdown."""
        folder = self.run_dir / "samples"
        stem = f"step_{step:06d}" + (f"_{name}" if name else "")
        path = folder / f"{stem}.md"
        rows = list(samples)
        with self._best_effort.writing("samples/"):
            folder.mkdir(exist_ok=True)
            values = ({**vars(row), "reward": to_number(row.reward)} for row in rows)
            lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in values)
            (folder / f"{stem}.jsonl").write_text("".join(lines), "utf-8")
            path.write_text(f"# Step {step} {name}\n".rstrip() + "\n" + "".join(map(_sample_markdown, rows)), "utf-8")
        return path

    def log_problems(self, step: int, problems: Sequence[Problem]) -> None:
        """Write one evaluation, a line of JSON per problem with the reward of each of its responses."""
        with self._best_effort.writing("evaluations/"):
            write_problems(problems, self.run_dir / "evaluations" / f"step_{step:06d}.jsonl")

    def print(self, text: str) -> None:
        """A line for people, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def summary(self, extra: Mapping[str, Any] | None = None) -> str:
        """Write `summary.json` and return the same as a few lines to print.

        Args:
            extra: facts to keep with it, for instance `{"engine": "SGLang 0.5.23 …", "trainer": "megatron-core …"}`.
        """
        values = summarise(self.history)
        values["facts"] = dict(extra or {})
        values["run_dir"] = str(self.run_dir)
        values["seconds"] = round(time.monotonic() - self._started, 1)
        with self._best_effort.writing(SUMMARY_FILE, "the run goes on without"):
            (self.run_dir / SUMMARY_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        lines = [f"{name}: {value}" for name, value in values["facts"].items()]
        for name, (first, last) in values["first_last"].items():
            lines.append(f"{name}: {first:.4g} → {last:.4g}")
        lines.append(f"{values['steps']} steps in {values['seconds']:.0f} s")
        return "\n".join([*lines, f"run directory: {self.run_dir}"])

    def close(self) -> None:
        """Flush and close everything."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
        with self._best_effort.writing(METRICS_FILE, f"{self._metrics.waiting} lines of it are lost"):
            self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _open_bar(self, start_step: int) -> Any:
        from tqdm import tqdm

        return tqdm(total=self.total_steps, initial=start_step, unit="step", file=self._stream, dynamic_ncols=True)

    def _show(self, step: int, record: Mapping[str, Any]) -> None:
        shown = [
            f"{label} {format(record[metric], spec)}"
            for metric, label, spec in PROGRESS_METRICS
            if record.get(metric) is not None
        ]
        shown += _scores(record)
        if self._bar is not None:
            self._bar.set_postfix_str(" · ".join(shown), refresh=False)
            self._bar.update(max(step - self._bar.n, 0))
            self._bar.refresh()
        else:
            print(f"step {step}/{self.total_steps} · " + " · ".join(shown), file=self._stream, flush=True)


def summarise(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Number of steps, and the first and last value of the reward and of every evaluation's scores."""
    first_last: dict[str, tuple[float, float]] = {}
    for record in history:
        for name, value in record.items():
            if is_told_at_the_end(name) and value is not None:
                first_last[name] = (first_last.get(name, (value,))[0], value)
    evaluations_first = dict(sorted(first_last.items(), key=lambda item: (not item[0].startswith("eval/"), item[0])))
    return {"steps": max((record["step"] for record in history), default=0), "first_last": evaluations_first}


def _scores(record: Mapping[str, Any]) -> list[str]:
    return [
        f"{name.removeprefix('eval/')} {value:.3f}"
        for name, value in record.items()
        if is_score(name) and value is not None
    ]


def _sample_markdown(sample: LoggedSample) -> str:
    """One response; the fence is longer than any run of backticks inside it."""
    text = sample.prompt + sample.response
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    facts = [f"reward {sample.reward:g}"]
    facts += [f"expected `{sample.ground_truth}`"] if sample.ground_truth else []
    facts += [f"ended by {sample.finish_reason}"] if sample.finish_reason else []
    title = f"\n## {sample.prompt_id or 'response'}: {', '.join(facts)}\n"
    return f"{title}\n{fence}\n{sample.prompt}\n{fence}\n\n{fence}\n{sample.response}\n{fence}\n"
