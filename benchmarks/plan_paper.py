"""What `plan` says of the paper's runs on four kinds of GPU, as the rows of a table: memory and seconds of a step.

    python benchmarks/plan_paper.py

Estimates, not measurements: half of the longest response on average, 25% MFU in training. `docs/paper.md` has the rows.
"""

from __future__ import annotations

from pathlib import Path

from vespo_megatron.megatron.hardware import gpu
from vespo_megatron.plan.planner import GIB, plan
from vespo_megatron.plan.published import shape_of
from vespo_megatron.plan.timing import default_lengths
from vespo_megatron.recipe.loader import load_recipe

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUNS = {
    "qwen3_30b_a3b/grid/vespo_n8": "Qwen3-30B-A3B-Base",
    "qwen3_30b_a3b/async/vespo": "Qwen3-30B-A3B-Base",
    "qwen3_8b/vespo": "Qwen3-8B-Base",
    "llama32_3b/vespo": "Llama-3.2-3B-Instruct",
    "olmoe_1b_7b/vespo": "OLMoE-1B-7B-0924-Instruct",
}
GPUS = ("h20-96", "h100-80", "h200-141", "b200-180")


def row(run: str) -> str:
    """`| run | layout | GiB, s | … |`, a cell per GPU; a run that does not fit says so."""
    recipe = load_recipe(EXAMPLES / f"{run}.yaml", [f"policy.model_name={RUNS[run]}"])
    shape, cells = shape_of(RUNS[run]), []
    for name in GPUS:
        made = plan(shape, recipe, gpu(name), default_lengths(recipe))
        fits = "" if made.fits else ", does not fit"
        cells.append(f"{made.memory.device / GIB:.0f} GiB, {made.step:,.0f} s{fits}")
    return f"| `{run}` | {made.layout} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    for each in RUNS:
        print(row(each))
