"""The picture of `vespo-megatron predict`: φ, ESS and the share of responses with φ > ½ by length."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vespo_megatron.outputs import written
from vespo_megatron.plan.prediction import BEHAVIORS, Scenario

_POINTS = 48


def draw(made: Scenario, longest: int, output: Path) -> None:
    """Three panels over the length (logarithmic), a colour per behaviour; A ≥ 0 solid, A < 0 dashed.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({round(float(length)) for length in np.geomspace(1, max(longest, 2), _POINTS)})
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharex=True)
    for number, behavior in enumerate(made.behaviors):
        points = [made.at(behavior, length) for length in lengths]
        color, label = f"C{number}", BEHAVIORS[behavior]
        axes[0].plot(lengths, [p.phi_positive for p in points], color=color, label=f"{label}, A ≥ 0")
        axes[0].plot(lengths, [p.phi_negative for p in points], color=color, linestyle="--", label=f"{label}, A < 0")
        axes[1].plot(lengths, [p.ess for p in points], color=color)
        axes[2].plot(lengths, [p.above_half_positive for p in points], color=color)
        axes[2].plot(lengths, [p.above_half_negative for p in points], color=color, linestyle="--")
    for axis, title in zip(axes, ("mean φ", "normalised ESS of W", "share with φ > ½"), strict=True):
        axis.set(title=title, xscale="log", xlabel="response tokens")
        axis.set_ylim(bottom=-0.02)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    title = f"{made.name}: engine k3 {made.engine.k3:.3g}, staleness k3 {made.staleness.k3:.3g} per token"
    figure.suptitle(title, parse_math=False)  # the name may be a path with a dollar
    with written(output, "--out"):
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
