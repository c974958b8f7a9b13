"""A study's report: `report.html`, `tables.md`, `cells.csv`, `curves.csv` and its figures as PNGs, in one folder."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vespo_megatron.study.measures import LATE, RATIOS, by_layer
from vespo_megatron.study.outcomes import COLLAPSE, Outcome, cells_csv, curves_csv, read_outcomes
from vespo_megatron.study.pages import Picture, page
from vespo_megatron.study.panels import PANELS, Panel, canvas, png, scale
from vespo_megatron.study.spec import Study
from vespo_megatron.study.statistics import LEVEL, Difference, Mean, holm, mean, paired

MARKERS = "osD^vP*Xd"
_ACCURACY = "accuracy"


@dataclass(frozen=True)
class Row:
    """A variant within one setting of the other axes."""

    variant: str
    setting: tuple[str, ...]
    runs: list[Outcome]
    accuracy: Mean
    best: Mean
    collapsed: int
    late: dict[str, Mean]
    difference: Difference | None
    """To the baseline's accuracy; None for the baseline itself."""
    also: dict[str, Difference]
    """To the baseline's late means that the study compares; of logarithms for `RATIOS`."""

    @property
    def finished(self) -> int:
        return sum(run.state == "finished" for run in self.runs)


def write_study_report(study: Study, folder: Path | None = None) -> Path:
    """Write everything to `folder` (default the study's output). Returns the page; runs may still be in progress."""
    folder = folder or study.output
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = read_outcomes(study)
    rows = compare_rows(study, outcomes)
    pictures = figures(study, rows)
    (folder / "figures").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        (folder / "figures" / f"{name}.png").write_bytes(picture.content)
    (folder / "cells.csv").write_text(cells_csv(study, outcomes))
    (folder / "curves.csv").write_text(curves_csv(study, outcomes))
    (folder / "tables.md").write_text(tables(study, rows))
    output = folder / "report.html"
    output.write_text(
        page(
            "study.html.j2", title=f"Study: {study.name}", study=study, rows=rows, sentences=sentences(study, rows),
            pictures=list(pictures.values()), late=[name for name in LATE if _present(rows, name)],
            collapse=COLLAPSE, level=LEVEL, facts=_facts(outcomes),
            done=sum(outcome.state == "finished" for outcome in outcomes), outcomes=outcomes,
        ),
        encoding="utf-8",
    )  # fmt: skip
    return output


def compare_rows(study: Study, outcomes: Sequence[Outcome]) -> list[Row]:
    """Rows by setting, then variant, compared over the seeds that both of a pair have finished."""
    by_levels: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        by_levels.setdefault(outcome.cell.levels, []).append(outcome)
    places = [(setting, variant) for setting in study.settings for variant in study.variants]
    compared = [place for place in places if place[1] != study.baseline]
    differences = {
        measure: dict(
            zip(
                compared,
                holm([_difference(by_levels[(v, *s)], by_levels[(study.baseline, *s)], measure) for s, v in compared]),
                strict=True,
            )
        )
        for measure in (_ACCURACY, *study.also)
    }
    rows = []
    for setting, variant in places:
        runs = by_levels[(variant, *setting)]
        rows.append(
            Row(
                variant=variant,
                setting=setting,
                runs=runs,
                accuracy=_mean(run.accuracy for run in runs),
                best=_mean(run.best for run in runs if run.state == "finished"),
                collapsed=sum(run.collapsed for run in runs),
                late={name: _mean(run.late[name] for run in runs if run.state == "finished") for name in LATE},
                difference=differences[_ACCURACY].get((setting, variant)),
                also={name: differences[name][setting, variant] for name in study.also if variant != study.baseline},
            )
        )
    return rows


def sentences(study: Study, rows: Sequence[Row]) -> list[str]:
    """What the comparisons say, one sentence each: accuracy first, and of each measure what was found."""
    said = []
    for measure in (_ACCURACY, *study.also):
        for row in rows:
            difference = row.difference if measure == _ACCURACY else row.also.get(measure)
            if difference is not None:
                found = difference.verdict in ("higher", "lower")
                said.append((measure != _ACCURACY, measure, not found, _sentence(study, row, measure, difference)))
    return [text for *_, text in sorted(said, key=lambda item: item[:3])]


def _sentence(study: Study, row: Row, measure: str, difference: Difference) -> str:
    where = f" at {', '.join(row.setting)}" if row.setting else ""

    def number(value: float) -> str:
        return f"×{math.exp(value):.3g}" if measure in RATIOS else f"{value:+.3f}"

    by = difference.mean
    numbers = f"{number(by.value)} {measure}"
    if not math.isnan(by.half):
        numbers += f" [{number(by.value - by.half)}, {number(by.value + by.half)}]"
    if not math.isnan(difference.adjusted_p):
        numbers += f", adjusted p = {difference.adjusted_p:.2g}"
    return f"{row.variant} against {study.baseline}{where}: {difference.verdict} ({numbers}, {by.count} seeds)."


def tables(study: Study, rows: Sequence[Row]) -> str:
    """Markdown: the accuracy by variant and setting, the same of the paper, and the comparisons."""
    headings = [" ".join(setting) or "accuracy" for setting in study.settings]
    place = {(row.variant, row.setting): row for row in rows}
    lines = [f"| {next(iter(study.axes))} | {' | '.join(headings)} |", f"|---|{'---|' * len(headings)}"]
    for variant in study.variants:
        cells = [_accuracy_text(place[variant, setting]) for setting in study.settings]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    if study.published.values:
        lines += ["", f"Published ({study.published.source}), per cent:", ""]
        lines += [f"| {next(iter(study.axes))} | {' | '.join(headings)} |", f"|---|{'---|' * len(headings)}"]
        for variant in study.variants:
            values = [study.published.value((variant, *setting)) for setting in study.settings]
            if any(value is not None for value in values):
                lines.append(f"| {variant} | {' | '.join('-' if v is None else f'{v:.1f}' for v in values)} |")
    shown = [name for name in LATE if _present(rows, name)]
    lines += ["", "Means over the last quarter of the steps:", ""]
    lines += [f"| {' | '.join(study.axes)} | {' | '.join(shown)} |", f"|{'---|' * (len(study.axes) + len(shown))}"]
    for row in rows:
        values = [f"{row.late[name].value:.4g}" if row.late[name].count else "-" for name in shown]
        lines.append(f"| {' | '.join((row.variant, *row.setting))} | {' | '.join(values)} |")
    return "\n".join([*lines, "", *(f"- {text}" for text in sentences(study, rows)), ""])


# ---- figures -------------------------------------------------------------------------------------------------------


def figures(study: Study, rows: Sequence[Row]) -> dict[str, Picture]:
    """Pictures by file name: accuracy over settings, then curves with bands of the seeds."""
    pictures = {}
    if len(study.settings) > 1:
        content = _over_settings(study, rows)
        caption = "Mean of the seeds' last evaluations with its confidence interval; hollow: the paper's."
        pictures["accuracy"] = Picture("Held-out accuracy at the end", caption, content)
    shown = PANELS if len(study.settings) == 1 else [p for p in PANELS if p.title in _OF_SETTINGS]
    for panel in shown:
        for setting in study.settings:
            chosen = [row for row in rows if row.setting == setting]
            if (content := _curves(panel, chosen)) is not None:
                where = f", {', '.join(setting)}" if setting else ""
                name = "_".join((panel.title.lower().replace(" ", "_"), *setting)).replace("/", "_")
                caption = f"{panel.caption} Line: mean of the seeds; band: lowest to highest."
                pictures[name] = Picture(panel.title + where, caption, content)
    return pictures


_OF_SETTINGS = ("Held-out accuracy", "Reward", "Effective sample size", "Staleness")
"""What is drawn for each setting of a study that has several."""


def _curves(panel: Panel, rows: Sequence[Row]) -> bytes | None:
    if panel.stacked:
        return None
    figure, axes = canvas()
    everything: list[float] = []
    for row in rows:
        names = {name for run in row.runs for record in run.history for name in record}
        metrics = sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in panel.patterns))
        if panel.over == "layer":
            series = [by_layer(run.history, metrics) for run in row.runs]
        else:
            series = [run.series(metric) for metric in metrics[:1] for run in row.runs]
        places = sorted({place for values in series for place in values})
        at = [[values[place] for values in series if place in values] for place in places]
        if not at:
            continue
        (line,) = axes.plot(places, [math.fsum(v) / len(v) for v in at], linewidth=1.4, label=row.variant)
        axes.fill_between(
            places, [min(v) for v in at], [max(v) for v in at], alpha=0.15, color=line.get_color(), linewidth=0
        )
        everything += [value for values in at for value in values]
    if not everything:
        return None
    scale(axes, panel, everything)
    return png(figure, axes, legend=True, x=panel.over)


def _over_settings(study: Study, rows: Sequence[Row]) -> bytes:
    figure, axes = canvas()
    places = range(len(study.settings))
    for number, variant in enumerate(study.variants):
        chosen = [row for row in rows if row.variant == variant]
        shift = 0.04 * (number - (len(study.variants) - 1) / 2)
        halves = [0.0 if math.isnan(row.accuracy.half) else row.accuracy.half for row in chosen]
        drawn = axes.errorbar(
            [place + shift for place in places], [row.accuracy.value for row in chosen], yerr=halves,
            marker=MARKERS[number % len(MARKERS)], markersize=4, linewidth=1.2, capsize=2, label=variant,
        )  # fmt: skip
        published = [study.published.value((variant, *setting)) for setting in study.settings]
        known = [(place + shift, value / 100) for place, value in zip(places, published, strict=True) if value]
        if known:
            axes.plot(
                *zip(*known, strict=True), linestyle="", marker=MARKERS[number % len(MARKERS)], markersize=4,
                markerfacecolor="none", color=drawn[0].get_color(), alpha=0.6,
            )  # fmt: skip
    axes.set_xticks(list(places), [" ".join(setting) for setting in study.settings])
    axes.set_ylim(-0.02, 1.02)
    return png(figure, axes, legend=True, x=", ".join(list(study.axes)[1:]))


# ---- parts ---------------------------------------------------------------------------------------------------------


def _difference(variant: Sequence[Outcome], baseline: Sequence[Outcome], measure: str) -> Difference:
    """Over the seeds that both have finished."""

    def value(run: Outcome) -> float:
        if measure == _ACCURACY or run.state != "finished":
            return run.accuracy
        late = run.late[measure]
        return (math.log(late) if late > 0 else math.nan) if measure in RATIOS else late

    pairs = [(value(left), value(right)) for left, right in zip(variant, baseline, strict=True)]
    known = [pair for pair in pairs if not any(map(math.isnan, pair))]
    return paired([left for left, _ in known], [right for _, right in known])


def _mean(values) -> Mean:
    return mean([value for value in values if not math.isnan(value)])


def _present(rows: Sequence[Row], name: str) -> bool:
    return any(row.late[name].count for row in rows)


def _accuracy_text(row: Row) -> str:
    text = row.accuracy.text()
    if row.finished < len(row.runs):
        text += f" ({row.finished} of {len(row.runs)} runs)"
    return text + (f", {row.collapsed} collapsed" if row.collapsed else "")


def _facts(outcomes: Sequence[Outcome]) -> dict[str, str]:
    facts = {"machine": f"{platform.machine()}, Python {platform.python_version()}"}
    for package in ("torch", "megatron-core", "sglang", "transformers"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    if commit.returncode == 0:
        facts["commit"] = commit.stdout.strip()
    seconds = [outcome.seconds for outcome in outcomes if not math.isnan(outcome.seconds)]
    if seconds:
        facts["time"] = f"{sum(seconds) / 3600:.1f} hours of runs, {sum(seconds) / len(seconds):.0f} s each"
    return facts
