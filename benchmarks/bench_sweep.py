"""What a sweep's runs cost beside their training: forked from a process that has imported all, against a command each.

    python benchmarks/bench_sweep.py [--record]

Six runs of two steps of the tiny example with its in-process engine, one after another, in turns. `compare` starts runs
of one process in the first way, those of several in the second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import record  # noqa: E402
from vespo_megatron.recipe.loader import load_recipe, save_recipe  # noqa: E402
from vespo_megatron.study.compare import environment  # noqa: E402
from vespo_megatron.study.run_process import CommandRun, RunForker, RunProcess  # noqa: E402

RUNS = 6
OVERRIDES = [
    "grpo.max_num_steps=2",
    "grpo.val_period=0",
    "checkpointing.save_hf=false",
    "logger.tensorboard_enabled=false",
]


def seconds(start: Callable[[Path, Path], RunProcess], folder: Path, name: str) -> float:
    """Wall-clock of one run."""
    recipe = load_recipe(
        ROOT / "examples/tiny_moe/in_process.yaml",
        [*OVERRIDES, f"exp_manager.exp_dir={folder}", f"exp_manager.name={name}", "exp_manager.version=0"],
    )
    file, log = folder / f"{name}.yaml", folder / f"{name}.log"
    save_recipe(recipe, file)
    started = time.perf_counter()
    run = start(file, log)
    if not run.wait(300) or run.poll() != 0:
        raise SystemExit(log.read_text())
    return time.perf_counter() - started


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    variables = environment(load_recipe(ROOT / "examples/tiny_moe/in_process.yaml", []))
    took: dict[str, list[float]] = {"a command each": [], "forked": []}
    forker = RunForker(variables)
    ways = {"a command each": lambda file, log: CommandRun(file, log, variables), "forked": forker.start}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(RUNS):
            for way, start in ways.items():
                took[way].append(seconds(start, Path(folder), f"{way.replace(' ', '_')}_{number}"))
    lines = ["| runs | first, s | median of the others, s |", "|---|---|---|"]
    lines += [f"| {way} | {values[0]:.1f} | {statistics.median(values[1:]):.1f} |" for way, values in took.items()]
    ratio = statistics.median(took["a command each"][1:]) / statistics.median(took["forked"][1:])
    text = "\n".join(
        [f"{RUNS} runs of two steps each way, in turns; a run's seconds.", "", *lines, "", f"×{ratio:.1f}"]
    )
    print(text)
    if arguments.record:
        record("Starting the runs of a sweep", text)


if __name__ == "__main__":
    main()
