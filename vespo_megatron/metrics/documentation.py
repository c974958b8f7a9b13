"""docs/metrics.md, made from the table: `python -m vespo_megatron.metrics.documentation > docs/metrics.md`."""

from __future__ import annotations

from vespo_megatron.metrics.table import AREAS, Metric

_INTRODUCTION = """# Metrics

Every metric that a run writes to `metrics.jsonl` and TensorBoard, made from `vespo_megatron/metrics/table.py`. A `*`
stands for what is known at run time alone: a phase, a layer, a problem set, a part of the reward. **Merges** says how
the values of a step's parts (sampling rounds, optimizer updates, a phase that comes twice) make the step's; *of the
whole* are computed of everything at once. What is not in the table cannot be logged.

Which policies W (of a whole response, clamped to e^±20 unless said otherwise) and d (of a token, clamped to ±20)
compare is a matter of `loss_fn.behavior`; the console's first lines and the report name it. W is what φ sees, before a
correction.

| behaviour | W | d |
|---|---|---|
| `rollout` | π_θ/μ | log π_θ − log μ |
| `recompute`, `version` | π_θ/π_old | log π_old − log μ |

With `rollout`, d holds staleness as well as the difference of engines; the first update of a rollout batch is not
stale, so its k3 is the engines' alone. With the others d is the engines' difference in every update, and `staleness/k3`
is what the updates add to it. Objectives that always compare with μ (`dppo_*`) have W = π_θ/μ in every mode.
"""


def markdown() -> str:
    """The page."""
    parts = [_INTRODUCTION]
    for title, metrics in AREAS.items():
        lines = [f"## {title}", "", "| metric | what | unit | over | merges |", "|---|---|---|---|---|"]
        lines += [_row(metric) for metric in metrics]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _row(metric: Metric) -> str:
    cells = (f"`{metric.name}`", metric.meaning, metric.unit, metric.over, metric.merge.value)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(markdown(), end="")
