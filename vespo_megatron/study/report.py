"""`report.html` of one run or several: curves, settings, summary, in one file that needs no network.

    write_report(["runs/vespo/version_0"], "runs/vespo/version_0/report.html")

It reads only what a run directory holds (`metrics.jsonl`, `summary.json`, `recipe.yaml`, `samples/`) and shows what
is there: a metric that no run has leaves its panel out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.losses.behavior import describe
from vespo_megatron.outputs import check_file, written
from vespo_megatron.recipe.schema import MismatchConfig, QuantizationConfig
from vespo_megatron.recipe.schema.recipe import resolved_behavior
from vespo_megatron.run.metrics_file import read_metrics
from vespo_megatron.run.records import SUMMARY_FILE, summarise
from vespo_megatron.study.measures import by_layer
from vespo_megatron.study.pages import Picture, page
from vespo_megatron.study.panels import PANELS, Panel, canvas, png, scale

RECIPE_FILE = "recipe.yaml"
MISMATCH, QUANTIZATION = "policy.generation.mismatch", "policy.quantization"


SETTINGS: tuple[tuple[str, str], ...] = (
    ("Model", "policy.model_name"),
    ("Objective", "loss_fn.name"),
    ("Aggregation", "loss_fn.aggregation"),
    ("Behaviour policy", "loss_fn.behavior"),
    ("Router replay", "policy.router_replay.mode"),
    ("Prompts per step", "grpo.num_prompts_per_step"),
    ("Responses per prompt", "grpo.num_generations_per_prompt"),
    ("Responses per update", "policy.train_global_batch_size"),
    ("Steps", "grpo.max_num_steps"),
    ("Seed", "grpo.seed"),
    ("Learning rate", "policy.megatron_cfg.optimizer.lr"),
    ("Precision", "policy.precision"),
    ("Tensor parallel", "policy.megatron_cfg.tensor_model_parallel_size"),
    ("Sequence parallel", "policy.megatron_cfg.sequence_parallel"),
    ("Pipeline parallel", "policy.megatron_cfg.pipeline_model_parallel_size"),
    ("Context parallel", "policy.megatron_cfg.context_parallel_size"),
    ("Expert parallel", "policy.megatron_cfg.expert_model_parallel_size"),
    ("Trainer processes per node", "cluster.gpus_per_node"),
    ("Trainer nodes", "cluster.num_nodes"),
    ("Rollout engine", "policy.generation.backend"),
    ("Mismatch by recipe", MISMATCH),
    ("Rounded weights", QUANTIZATION),
    ("Response tokens at most", "policy.generation.max_new_tokens"),
    ("Temperature", "policy.generation.temperature"),
)


@dataclass(frozen=True)
class Run:
    """What a report needs of one run."""

    label: str
    history: list[dict[str, Any]]
    recipe: Mapping[str, Any]
    summary: Mapping[str, Any]
    sample_text: str

    def names(self, patterns: Sequence[str]) -> list[str]:
        """The run's metrics that match a pattern and have a value somewhere, sorted."""
        present = {name for record in self.history for name, value in record.items() if value is not None}
        return sorted(name for name in present if any(fnmatchcase(name, pattern) for pattern in patterns))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values where the metric has one."""
        points = [(record["step"], record[name]) for record in self.history if record.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]


def write_report(run_dirs: Sequence[str | Path], output: str | Path) -> Path:
    """Write a report of these run directories to `output`; returns it.

    Raises `UserError` when a directory does not exist, none of them holds a finished step, or `output` cannot be
    written.
    """
    output = Path(output)
    check_file(output, "--output")
    text = render(load_runs([Path(run_dir) for run_dir in run_dirs]))
    with written(output, "--output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    return output


def load_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Read run directories, labelled by as much of their path as tells them apart."""
    if not run_dirs:
        raise UserError("no run directory given", where="report", expected="one run directory or several")
    for folder in run_dirs:
        if not folder.is_dir():
            raise UserError("no such run directory", where=str(folder), fix="give <exp_dir>/<name>/<version>")
    runs = [
        Run(
            label=label,
            history=read_metrics(folder),
            recipe=_read_recipe(folder / RECIPE_FILE),
            summary=_read_json(folder / SUMMARY_FILE),
            sample_text=_last_samples(folder / "samples"),
        )
        for folder, label in zip(run_dirs, _labels(run_dirs), strict=True)
    ]
    if not any(run.history for run in runs):
        where = ", ".join(str(folder) for folder in run_dirs)
        raise UserError("no finished step to report", where=where, expected="a metrics.jsonl with one line or more")
    return runs


def render(runs: Sequence[Run]) -> str:
    """The page."""
    pictures = [(panel, picture) for panel in PANELS if (picture := draw(panel, runs)) is not None]
    return page(
        "report.html.j2",
        title="VESPO run" if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        results=_results(runs),
        facts=[(run.label, run.summary.get("facts") or {}) for run in runs],
        pictures=[Picture(panel.title, panel.caption, picture) for panel, picture in pictures],
        settings=_settings(runs),
        samples=[(run.label, run.sample_text) for run in runs if run.sample_text],
    )


def draw(panel: Panel, runs: Sequence[Run]) -> bytes | None:
    """The panel as PNG, or None when no run has its metrics."""
    lines = [(run, name) for run in runs for name in run.names(panel.patterns)]
    if not lines:
        return None
    figure, axes = canvas()
    several_names = len({name for _, name in lines}) > 1
    if panel.over == "layer":
        for run in runs:
            layers = by_layer(run.history, run.names(panel.patterns))
            axes.plot(list(layers), list(layers.values()), marker="o", markersize=3, linewidth=1.6, label=run.label)
        return png(figure, axes, legend=len(runs) > 1, x=panel.over)
    if panel.stacked and len(runs) == 1:
        _draw_stacked(axes, runs[0], [name for _, name in lines if name != "time/step"])  # the whole, not a part
    else:
        for run, name in lines:
            steps, values = run.series(name)
            label = " ".join(([run.label] if len(runs) > 1 else []) + ([_short(name)] if several_names else []))
            axes.plot(steps, values, marker="o" if len(steps) <= 40 else "", markersize=3, linewidth=1.6, label=label)
        scale(axes, panel, [value for run, name in lines for value in run.series(name)[1]])
    return png(figure, axes, legend=several_names or len(runs) > 1)


def _draw_stacked(axes: Any, run: Run, names: Sequence[str]) -> None:
    steps = [record["step"] for record in run.history if any(record.get(name) is not None for name in names)]
    rows = [record for record in run.history if record["step"] in set(steps)]
    bottom = [0.0] * len(rows)
    for name in names:
        heights = [record.get(name) or 0.0 for record in rows]
        axes.bar(steps, heights, bottom=bottom, width=0.9, label=_short(name))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]


def _short(name: str) -> str:
    return name.removeprefix("time/").removeprefix("eval/").removeprefix("staleness/")


def _results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows of the summary table: one per run and metric, first value and last."""
    rows = []
    for run in runs:
        values = summarise(run.history)
        rows += [
            {"run": run.label, "metric": name, "first": f"{first:.3f}", "last": f"{last:.3f}", "steps": values["steps"]}
            for name, (first, last) in values["first_last"].items()
        ]
    return rows


def _settings(runs: Sequence[Run]) -> list[tuple[str, str, list[str]]]:
    """Meaning, recipe key, and its value in each run; keys that no run has are left out."""
    rows = []
    for title, path in SETTINGS:
        values = []
        for run in runs:
            value: Any = run.recipe
            for part in path.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if path == MISMATCH:
                value = MismatchConfig.model_validate(value or {}).phrase or None
            if path == QUANTIZATION:
                value = QuantizationConfig.model_validate(value or {}).phrase or None
            values.append("-" if value is None else str(value))
        if any(value != "-" for value in values):
            rows.append((title, path, values))
        if path == "loss_fn.behavior" and any(run.recipe for run in runs):
            rows.append(("W and mismatch compare", "", [_compared(run.recipe) if run.recipe else "-" for run in runs]))
    return rows


def _compared(recipe: Mapping[str, Any]) -> str:
    """What W and d are of in a run, from its recipe."""
    given = recipe.get("loss_fn", {}).get("behavior", "auto")
    asynchronous = recipe.get("grpo", {}).get("async_grpo", {}).get("enabled", False)
    return describe(resolved_behavior(given, asynchronous=asynchronous))


def _labels(run_dirs: Sequence[Path]) -> list[str]:
    """The shortest tails of the paths, of at least two parts, that are all different."""
    parts = [folder.resolve().parts for folder in run_dirs]
    for length in range(2, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in run_dirs]


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, Mapping) else {}


def _read_recipe(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return value if isinstance(value, Mapping) else {}


def _last_samples(folder: Path, limit: int = 4000) -> str:
    """The last samples a run wrote, cut at `limit` characters."""
    written = sorted(folder.glob("*.md"))
    if not written:
        return ""
    text = written[-1].read_text(encoding="utf-8")
    return text if len(text) <= limit else text[:limit] + "\n…"
