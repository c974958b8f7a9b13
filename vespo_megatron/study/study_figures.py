"""A study's figures: the accuracy over its settings, and every panel over the steps with a band of the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from vespo_megatron.metrics.table import metric
from vespo_megatron.study.comparison import ACCURACY, Row
from vespo_megatron.study.measures import EXPECTED, LATE, RATIOS, by_layer
from vespo_megatron.study.pages import Picture
from vespo_megatron.study.panels import PANELS, Panel, canvas, png, scale
from vespo_megatron.study.spec import Study

MARKERS = "osD^vP*Xd"


def figures(study: Study, rows: Sequence[Row]) -> dict[str, dict[str, Picture]]:
    """Heading → file name → picture: the accuracy over the settings, then each setting's curves."""
    galleries = {}
    if len(study.settings) > 1:
        galleries["Over the settings"] = {
            measure: picture for measure in (ACCURACY, *study.also) if (picture := _over_settings(measure, study, rows))
        }
    for setting in study.settings:
        chosen = [row for row in rows if row.setting == setting]
        pictures = {}
        for panel in PANELS:
            if (content := _curves(panel, chosen)) is not None:
                name = "_".join((panel.title.lower().replace(" ", "_"), *setting)).replace("/", "_")
                caption = f"{panel.caption} Line: mean of the seeds; band: lowest to highest."
                pictures[name] = Picture(", ".join((panel.title, *setting)), caption, content)
        galleries[f"At {', '.join(setting)}" if setting else "Figures"] = pictures
    return galleries


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


def _over_settings(measure: str, study: Study, rows: Sequence[Row]) -> Picture | None:
    """A line per variant; None where no run has the measure."""
    figure, axes = canvas()
    places = range(len(study.settings))
    everything: list[float] = []
    for number, variant in enumerate(study.variants):
        chosen = [row for row in rows if row.variant == variant]
        shift = 0.04 * (number - (len(study.variants) - 1) / 2)
        means = [row.accuracy if measure == ACCURACY else row.late[measure] for row in chosen]
        drawn = axes.errorbar(
            [place + shift for place in places],
            [mean.value for mean in means],
            yerr=[0.0 if math.isnan(mean.half) else mean.half for mean in means],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=variant,
        )
        everything += [mean.value for mean in means if not math.isnan(mean.value)]
        hollow = _hollow(measure, study, variant, chosen)
        known = [(place + shift, value) for place, value in zip(places, hollow, strict=True) if value is not None]
        if known:
            axes.plot(
                *zip(*known, strict=True),
                linestyle="",
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                markerfacecolor="none",
                color=drawn[0].get_color(),
                alpha=0.6,
            )
    if not everything:
        return None
    axes.set_xticks(list(places), [" ".join(setting) for setting in study.settings], parse_math=False)
    if measure in RATIOS and min(everything) > 0:
        axes.set_yscale("log")
    elif measure == ACCURACY:
        axes.set_ylim(-0.02, 1.02)
    content = png(figure, axes, legend=True, x=", ".join(list(study.axes)[1:]))
    if measure == ACCURACY:
        caption = "Mean of the seeds' accuracies with its confidence interval; hollow: the paper's."
        return Picture("Held-out accuracy at the end", caption, content)
    caption = f"{metric(LATE[measure]).meaning} Late in the runs, mean over seeds with its confidence interval"
    return Picture(measure, caption + ("; hollow: the formula's." if measure in EXPECTED else "."), content)


def _hollow(measure: str, study: Study, variant: str, rows: Sequence[Row]) -> list[float | None]:
    """What is drawn beside a variant's own marks, by setting: the paper's accuracy, or what a formula expects."""
    if measure == ACCURACY:
        published = [study.published.value((variant, *setting)) for setting in study.settings]
        return [None if value is None else value / 100 for value in published]
    if measure in EXPECTED:
        means = [row.late[EXPECTED[measure]] for row in rows]
        return [mean.value if mean.count else None for mean in means]
    return [None] * len(rows)
