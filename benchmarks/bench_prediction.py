"""φ predicted from a run's mismatch beside the φ it had: rollouts from rounded weights, two doses, two behaviours.

    python examples/tiny_moe/prepare.py --task long --output examples/tiny_moe/build_long
    python benchmarks/bench_prediction.py [--bits 3 4] [--steps 6] [--record]

The engine gets attention and expert weights rounded per output row (`policy.generation.mismatch`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import record  # noqa: E402
from vespo_megatron.plan.measured_mismatch import read_measured  # noqa: E402
from vespo_megatron.plan.prediction import KNOWLEDGE, check_run  # noqa: E402


def run(folder: Path, bits: int, behavior: str, steps: int, recipe: str) -> Path:
    """One run in a process of its own; returns its directory."""
    from vespo_megatron.recipe.loader import load_recipe, save_recipe
    from vespo_megatron.run.run_directory import RECIPE_FILE

    run_dir = folder / f"{behavior}_{bits}"
    run_dir.mkdir(parents=True)
    overrides = [
        f"loss_fn.behavior={behavior}",
        f"grpo.max_num_steps={steps}",
        "grpo.val_at_start=false",
        "grpo.val_at_end=false",
        "grpo.val_period=0",
        "logger.progress=false",
        f"policy.generation.mismatch.weights=int{bits}",
    ]
    save_recipe(load_recipe(recipe, overrides), run_dir / RECIPE_FILE)
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vespo_megatron.launch.worker", str(run_dir), "train"]
    subprocess.run(command, check=True, timeout=1800, env=os.environ | environment, cwd=ROOT)
    return run_dir


def main() -> None:
    """Run, compare, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", choices=[3, 4, 6, 8], default=[3, 4])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--recipe", default="examples/studies/long.yaml")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    lines = ["| bits | behavior | k3 | k2 | φ of | measured | " + " | ".join(KNOWLEDGE) + " |", "|---" * 9 + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for bits in arguments.bits:
            for behavior in ("rollout", "recompute"):
                run_dir = run(Path(folder), bits, behavior, arguments.steps, arguments.recipe)
                measured = read_measured(run_dir, replay="none")
                engine, check = measured.engine, check_run(measured)
                if check is None:
                    raise SystemExit(f"{run_dir} measured no φ")
                for row in check:
                    numbers = " | ".join(f"{value:.3f}" for value in (row.measured, *row.predicted))
                    lines.append(
                        f"| {bits} | {behavior} | {engine.k3:.4f} | {engine.k2 or 0:.4f} | {row.label} | {numbers} |"
                    )
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        record("φ predicted and measured", text)


if __name__ == "__main__":
    main()
