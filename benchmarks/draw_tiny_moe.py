"""The README's first picture: what a run of the tiny example learned, from its run directory.

python benchmarks/draw_tiny_moe.py runs/tiny_moe/version_0
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vespo_megatron.run.metrics_file import read_metrics

OUTPUT = Path(__file__).parents[1] / "docs" / "images" / "tiny_moe.png"
PANELS = {
    "Held-out accuracy": {"eval/running_sums/greedy": "greedy", "eval/running_sums/avg@1": "sampled"},
    "Greedy, by digits": {
        "eval/running_sums/greedy_by/04-07_digits": "4 to 7 digits",
        "eval/running_sums/greedy_by/08-14_digits": "8 to 14",
    },
    "Tokens of a response": {"eval/response_length_mean": "held out", "response/length_mean": "training"},
}
"""Title → metric → label."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    rows = read_metrics(arguments.run)
    figure = Figure(figsize=(10.5, 2.9), dpi=160, layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        draw(axes, title, lines, rows)
    figure.savefig(arguments.output)


def draw(axes: Axes, title: str, lines: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """One panel: a line per metric over the steps."""
    for metric, label in lines.items():
        points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
        axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=2.5)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")


if __name__ == "__main__":
    main()
