"""φ predicted from a run's mismatch beside the φ it had: rollouts from rounded weights, two doses, two behaviours.

    python examples/tiny_moe/prepare.py --task long --output examples/tiny_moe/build_long
    python benchmarks/bench_prediction.py [--bits 3 4] [--steps 6] [--record]

The in-process engine gets attention and expert weights rounded per output row; embedding, head and routers as they are.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import record  # noqa: E402
from vespo_megatron.plan.measured_mismatch import read_measured  # noqa: E402
from vespo_megatron.plan.prediction import KNOWLEDGE, check_run  # noqa: E402
from vespo_megatron.recipe.schema import Recipe  # noqa: E402
from vespo_megatron.rollout_sglang.engine import RolloutEngine  # noqa: E402


def rounded(named_tensors: Iterable[tuple[str, torch.Tensor]], bits: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of attention and experts on a grid of 2^bits − 1 levels per output row."""
    levels = 2 ** (bits - 1) - 1
    for name, tensor in named_tensors:
        if ("self_attn" in name or "experts" in name) and name.endswith("proj.weight"):
            scale = tensor.abs().amax(dim=-1, keepdim=True) / levels
            tensor = (tensor / scale).round() * scale
        yield name, tensor


def train(run_dir: Path, bits: int) -> int:
    """The worker of a run whose engine has rounded weights."""
    from vespo_megatron.launch import worker
    from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine

    class RoundedEngine(InProcessEngine):
        """The in-process engine, of weights that are rounded on their way to it."""

        def update_weights(
            self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, *, in_place: bool = False
        ) -> str:
            return super().update_weights(rounded(named_tensors, bits), version, in_place=in_place)

    def build_engine(recipe: Recipe) -> RolloutEngine:
        return RoundedEngine(recipe.policy.model_name, context_length=recipe.policy.max_total_sequence_length)

    worker.build_engine = build_engine
    torch.set_num_threads(1)
    return worker.main(run_dir)


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
    ]
    save_recipe(load_recipe(recipe, overrides), run_dir / RECIPE_FILE)
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--worker", str(run_dir), "--bits", str(bits)]
    subprocess.run(command, check=True, timeout=1800, env=os.environ | environment, cwd=ROOT)
    return run_dir


def main() -> None:
    """Run, compare, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--recipe", default="examples/studies/long.yaml")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        sys.exit(train(arguments.worker, arguments.bits[0]))
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
