"""A study's figures: the accuracy over its settings, and every panel over the steps with a band of the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from vespo_megatron.study.comparison import Row
from vespo_megatron.study.measures import by_layer
from vespo_megatron.study.pages import Picture
from vespo_megatron.study.panels import PANELS, Panel, canvas, png, scale
from vespo_megatron.study.spec import Study

MARKERS = "osD^vP*Xd"


def figures(study: Study, rows: Sequence[Row]) -> dict[str, dict[str, Picture]]:
    """Heading → file name → picture: the accuracy over the settings, then each setting's curves."""
    galleries = {}
    if len(study.settings) > 1:
        caption = "Mean of the seeds' last evaluations with its confidence interval; hollow: the paper's."
        over_settings = Picture("Held-out accuracy at the end", caption, _over_settings(study, rows))
        galleries["Over the settings"] = {"accuracy": over_settings}
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


def _over_settings(study: Study, rows: Sequence[Row]) -> bytes:
    figure, axes = canvas()
    places = range(len(study.settings))
    for number, variant in enumerate(study.variants):
        chosen = [row for row in rows if row.variant == variant]
        shift = 0.04 * (number - (len(study.variants) - 1) / 2)
        halves = [0.0 if math.isnan(row.accuracy.half) else row.accuracy.half for row in chosen]
        drawn = axes.errorbar(
            [place + shift for place in places],
            [row.accuracy.value for row in chosen],
            yerr=halves,
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=variant,
        )
        published = [study.published.value((variant, *setting)) for setting in study.settings]
        known = [(place + shift, value / 100) for place, value in zip(places, published, strict=True) if value]
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
    axes.set_xticks(list(places), [" ".join(setting) for setting in study.settings], parse_math=False)
    axes.set_ylim(-0.02, 1.02)
    return png(figure, axes, legend=True, x=", ".join(list(study.axes)[1:]))
