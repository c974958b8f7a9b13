"""What a report shows of runs, and how a picture of it is drawn: small, so that its text stays legible on a phone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vespo_megatron.metrics.table import metric


@dataclass(frozen=True)
class Panel:
    """One picture: every metric that matches one of `patterns`, over steps. Title and caption are the first one's.

    Raises:
        UserError: a pattern that is no row of the table of metrics.
    """

    patterns: tuple[str, ...]
    share: bool = False
    """The values lie in 0…1: draw the axis so."""
    log: bool = False
    stacked: bool = False
    """Parts of a whole, drawn one on the other; for a single run only."""
    over: str = "step"
    """What is across: 'step', or 'layer', where metrics' names end in a layer's number (late means)."""

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            metric(pattern)

    @property
    def title(self) -> str:
        """Of the picture."""
        return metric(self.patterns[0]).title

    @property
    def caption(self) -> str:
        """What is drawn."""
        return metric(self.patterns[0]).meaning


PANELS: tuple[Panel, ...] = (
    Panel(("eval/*/avg@*",), share=True),
    Panel(("eval/*/greedy",), share=True),
    Panel(("eval/*/greedy_by/*",), share=True),
    Panel(("eval/*/by/*",), share=True),
    Panel(("eval/response_length_mean",)),
    Panel(("reward/mean",), share=True),
    Panel(("vespo/w_mean",)),
    Panel(("vespo/phi_mean",)),
    Panel(("vespo/ess",), share=True),
    Panel(("policy/entropy",)),
    Panel(("vespo/approx_kl",)),
    Panel(("loss/kl",)),
    Panel(("response/length_mean",)),
    Panel(("loss/grad_norm",), log=True),
    Panel(("mismatch/k3",), log=True),
    Panel(("mismatch/k3_first_update",), log=True),
    Panel(("time/*",), stacked=True),
    Panel(("throughput/tokens_per_second",)),
    Panel(("staleness/lag_mean", "staleness/lag_max")),
    Panel(("routes/agreement",), share=True),
    Panel(("routes/agreement_layer_*",), over="layer"),
    Panel(("routes/max_violation", "routes/max_violation_worst_layer")),
    Panel(("routes/max_violation_layer_*",), over="layer"),
    Panel(("routes/dead_experts", "routes/dead_experts_worst_layer")),
)


def canvas() -> tuple[Any, Any]:
    """A figure without a window, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def scale(axes: Any, panel: Panel, values: Sequence[float]) -> None:
    """The panel's y axis for these values."""
    if panel.log and min(values) > 0:
        axes.set_yscale("log")
    if panel.share and min(values) >= 0 and max(values) <= 1:
        axes.set_ylim(-0.02, 1.02)


def png(figure: Any, axes: Any, *, legend: bool, x: str = "step") -> bytes:
    """The finished picture."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x, fontsize=8)
    axes.tick_params(labelsize=8)
    if x in ("step", "layer"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    labels = axes.get_legend_handles_labels()[1]
    if labels and legend:
        columns = 1 if max(map(len, labels)) > 24 else min(3, len(labels))
        box = figure.legend(loc="outside upper left", ncols=columns, fontsize=8, frameon=False)
        for text in box.get_texts():  # names of runs and data sources, which may hold a dollar
            text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
