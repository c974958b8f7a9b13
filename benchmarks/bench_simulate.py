"""`vespo-megatron simulate` against real runs that it was not fitted to.

    python benchmarks/bench_simulate.py [--record]

The tiny example with SGLang's real server in its own process, one trainer process. Rates are taken from two runs, a
synchronous and an asynchronous one (`plan.rates.from_runs`); the pipeline model then says how many responses a second
each of four other settings makes: other bounds, other intervals between weights, other batch sizes. Idle machine only:
trainer and server share its cores.
"""

from __future__ import annotations

import argparse
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
from vespo_megatron.trainer.logging import read_metrics

EIGHT, SIXTEEN, FOUR = (
    ["grpo.num_prompts_per_step=8", "policy.train_global_batch_size=64"],
    ["grpo.num_prompts_per_step=16", "policy.train_global_batch_size=128"],
    ["grpo.num_prompts_per_step=4", "policy.train_global_batch_size=32"],
)
# SGLang 0.5.23 looks once a second whether a pause by abort is over, which at this size would be all there is to see.
ASYNC = ["grpo.async_grpo.enabled=true", "grpo.async_grpo.on_weight_update=in_place"]
FITTED = {
    "synchronous, 8 prompts": EIGHT,
    "max_staleness 1, 8 prompts": [*EIGHT, *ASYNC, "grpo.async_grpo.max_staleness=1"],
}
PREDICTED = {
    "synchronous, 16 prompts": SIXTEEN,
    "max_staleness 4, 8 prompts": [*EIGHT, *ASYNC, "grpo.async_grpo.max_staleness=4"],
    "max_staleness 2, weights every 4, 8 prompts": [
        *EIGHT, *ASYNC, "grpo.async_grpo.max_staleness=2", "grpo.async_grpo.sync_every=4",
    ],
    "max_staleness 2, 4 prompts": [*FOUR, *ASYNC, "grpo.async_grpo.max_staleness=2"],
}  # fmt: skip
WARM_UP = 5


def run(folder: Path, url: str, name: str, overrides: list[str], steps: int) -> Path:
    """Train; the run directory."""
    version = name.replace(" ", "_").replace(",", "")
    command = [
        sys.executable, "-m", "vespo_megatron.cli", "train", RECIPE, *ALONE, f"grpo.max_num_steps={steps}",
        "grpo.val_period=0", "checkpointing.save_hf=false", f"policy.generation.sglang_cfg.urls=[{url}]",
        f"exp_manager.exp_dir={folder}", "exp_manager.name=simulate", f"exp_manager.version={version}", *overrides,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=900)
    return folder / "simulate" / version


def throughput(run_dir: Path) -> float:
    """Responses a second of the steps after the first ones."""
    rows = [row for row in read_metrics(run_dir) if row["step"]]
    recipe = load_recipe(run_dir / "recipe.yaml")
    return recipe.rollout_batch_size * (len(rows) - WARM_UP) / (rows[-1]["wall_time"] - rows[WARM_UP - 1]["wall_time"])


def main() -> None:
    """Measure, predict, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    lines = [
        f"{arguments.steps} steps each, SGLang's real server and one trainer process on one machine; rates from the "
        "first two runs.",
        "",
        "| | measured responses/s | predicted | off by |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with launch_servers(load_recipe(RECIPE), folder) as servers:
            runs = {
                setting: run(folder, servers.urls[0], setting, overrides, arguments.steps)
                for setting, overrides in (FITTED | PREDICTED).items()
            }
        for setting, run_dir in runs.items():
            pipeline = from_runs(load_recipe(run_dir / "recipe.yaml"), [runs[each] for each in FITTED])
            predicted = simulate(replace(pipeline, steps=arguments.steps)).responses_per_second
            measured = throughput(run_dir)
            mark = " (fitted)" if setting in FITTED else ""
            lines.append(f"| {setting}{mark} | {measured:.1f} | {predicted:.1f} | {predicted / measured - 1:+.0%} |")
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        record("Simulated against real pipelines", text)


if __name__ == "__main__":
    main()
