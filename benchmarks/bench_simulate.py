"""`vespo-megatron simulate` against real runs that it was not fitted to.

    python benchmarks/bench_simulate.py [--record]

The tiny example with SGLang's real server on one core and one trainer process on another. Rates are taken from runs of
three settings that span how many responses are under way (`plan.rates.from_runs`); the pipeline model then says how
many responses a second each of four other settings makes: other bounds, other intervals between weights, other batches.
Every setting is run several times, in turns; idle machine only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bench_async import ALONE, RECIPE
from results import record

from vespo_megatron.plan.pipeline_model import simulate
from vespo_megatron.plan.rates import from_runs
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.rollout_sglang import launch_servers
from vespo_megatron.run.metrics_file import read_metrics

# SGLang 0.5.23 looks once a second whether a pause by abort is over, which at this size would be all there is to see.
_ASYNC = ["grpo.async_grpo.enabled=true", "grpo.async_grpo.on_weight_update=in_place"]


def _setting(prompts: int, max_staleness: int = 0, sync_every: int = 1) -> list[str]:
    overrides = [f"grpo.num_prompts_per_step={prompts}", f"policy.train_global_batch_size={8 * prompts}"]
    if max_staleness:
        overrides += [
            *_ASYNC,
            f"grpo.async_grpo.max_staleness={max_staleness}",
            f"grpo.async_grpo.sync_every={sync_every}",
        ]
    return overrides


FITTED = {
    "synchronous, 8 prompts": _setting(8),
    "synchronous, 32 prompts": _setting(32),
    "max_staleness 2, 8 prompts": _setting(8, 2),
}
PREDICTED = {
    "synchronous, 16 prompts": _setting(16),
    "max_staleness 1, 16 prompts": _setting(16, 1),
    "max_staleness 4, 8 prompts": _setting(8, 4),
    "max_staleness 1, weights every 2, 8 prompts": _setting(8, 1, 2),
}
WARM_UP = 5


def run(folder: Path, url: str, version: str, overrides: list[str], steps: int) -> Path:
    """Train; the run directory."""
    command = [
        sys.executable,
        "-m",
        "vespo_megatron.cli",
        "train",
        RECIPE,
        *ALONE,
        f"grpo.max_num_steps={steps}",
        "grpo.val_period=0",
        "checkpointing.save_hf=false",
        f"policy.generation.sglang_cfg.urls=[{url}]",
        f"exp_manager.exp_dir={folder}",
        "exp_manager.name=simulate",
        f"exp_manager.version={version}",
        *overrides,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=900)
    return folder / "simulate" / version


def throughput(run_dir: Path) -> float:
    """Responses a second of the steps after the first ones."""
    rows = [row for row in read_metrics(run_dir) if row["step"]]
    recipe = load_recipe(run_dir / "recipe.yaml")
    return recipe.rollout_batch_size * (len(rows) - WARM_UP) / (rows[-1]["wall_time"] - rows[WARM_UP - 1]["wall_time"])


def measure(folder: Path, rounds: int, steps: int) -> dict[str, list[Path]]:
    """Run directories of every setting; what `folder` holds already is not run again."""
    settings = FITTED | PREDICTED
    runs = {s: [folder / "simulate" / _version(s, number) for number in range(rounds)] for s in settings}
    if all(run_dir.is_dir() for run_dirs in runs.values() for run_dir in run_dirs):
        return runs
    one, *_, other = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {one})
    with launch_servers(load_recipe(RECIPE), folder) as servers:
        os.sched_setaffinity(0, {other})
        for number in range(rounds):
            for setting, overrides in settings.items():
                run(folder, servers.urls[0], _version(setting, number), overrides, steps)
    return runs


def _version(setting: str, number: int) -> str:
    return f"{setting} {number}".replace(" ", "_").replace(",", "")


def main() -> None:
    """Measure, predict, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the runs here, and use those that are here")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    lines = [
        f"{arguments.steps} steps each, medians of {arguments.rounds} runs, in turns; SGLang's real server on one "
        "core, one trainer process on another.",
        "",
        "| | measured responses/s (least to most) | predicted | off by |",
        "|---|---|---|---|",
    ]
    runs = measure(arguments.folder or Path(tempfile.mkdtemp()), arguments.rounds, arguments.steps)
    fitted = [run_dir for setting in FITTED for run_dir in runs[setting]]
    for setting, run_dirs in runs.items():
        pipeline = from_runs(load_recipe(run_dirs[0] / "recipe.yaml"), fitted)
        predicted = simulate(replace(pipeline, steps=arguments.steps)).responses_per_second
        measured = sorted(map(throughput, run_dirs))
        middle, mark = statistics.median(measured), " (fitted)" if setting in FITTED else ""
        lines.append(
            f"| {setting}{mark} | {middle:.1f} ({measured[0]:.1f} to {measured[-1]:.1f}) | {predicted:.1f} "
            f"| {predicted / middle - 1:+.0%} |"
        )
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        record("Simulated against real pipelines", text)


if __name__ == "__main__":
    main()
