"""What a report shows of runs, and how a picture of it is drawn: small, so that its text stays legible on a phone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Panel:
    """One picture: every metric that matches one of `patterns`, over steps."""

    title: str
    caption: str
    patterns: tuple[str, ...]
    share: bool = False
    """The values lie in 0…1: draw the axis so."""
    log: bool = False
    stacked: bool = False
    """Parts of a whole, drawn one on the other; for a single run only."""
    over: str = "step"
    """What is across: 'step', or 'layer', where metrics' names end in a layer's number (late means)."""


PANELS: tuple[Panel, ...] = (
    Panel("Held-out accuracy", "Mean over the validation prompts.", ("eval/*/avg@*",), share=True),
    Panel("Reward", "Mean reward of a rollout batch, before the step's updates.", ("reward/mean",), share=True),
    Panel("Importance weight W", "Mean of W = π/μ of whole responses; 1 is on-policy.", ("vespo/w_mean",)),
    Panel("Coefficient φ", "Mean of what multiplies A·∇log π; 1 at W = 1.", ("vespo/phi_mean",)),
    Panel("Effective sample size", "(Σw)² / (n·Σw²) of unclipped W; 1 is on-policy.", ("vespo/ess",), share=True),
    Panel("Entropy", "Nats per token, of the policy's own distribution.", ("policy/entropy",)),
    Panel("KL", "Estimate of KL(μ‖π) per token: −log W over the length, mean of responses.", ("vespo/approx_kl",)),
    Panel("KL to the reference", "Of the penalty, where there is one.", ("loss/kl",)),
    Panel("Response length", "Tokens, mean of a rollout batch.", ("response/length_mean",)),
    Panel("Gradient norm", "Before clipping.", ("loss/grad_norm",), log=True),
    Panel("Train-inference mismatch", "k3 estimate of KL(μ‖π) per token.", ("mismatch/k3",), log=True),
    Panel(
        "Mismatch of the engines",
        "The same over the first update of a rollout batch, which is not stale.",
        ("mismatch/k3_first_update",),
        log=True,
    ),
    Panel("Time per phase", "Seconds of each step.", ("time/*",), stacked=True),
    Panel("Throughput", "Tokens per second.", ("throughput/*tokens_per_second*",)),
    Panel("Staleness", "Weight versions between sampling and training.", ("staleness/lag_mean", "staleness/lag_max")),
    Panel("Route agreement", "Experts that trainer and engine agree on.", ("routes/agreement",), share=True),
    Panel(
        "Route agreement by layer",
        "The same, late in the run, layer by layer.",
        ("routes/agreement_layer_*",),
        over="layer",
    ),
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
        figure.legend(loc="outside upper left", ncols=columns, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
