"""The tiny example, as `make train` runs it, for several seeds: accuracy before and after, and how long it took.

    python benchmarks/bench_tiny_moe.py --seeds 1 2 3 --record

Each run starts its own SGLang server and trainer processes; seconds are of the whole command, start-up included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = "examples/tiny_moe/vespo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    rows = [run(seed, arguments) for seed in arguments.seeds]
    text = table(rows, arguments)
    print(text)
    if arguments.record:
        from results import record

        record(f"Tiny example: {Path(arguments.recipe).stem}", text)


def run(seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Train once in a folder of its own; raises `CalledProcessError` when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "vespo_megatron.cli",
            "train",
            arguments.recipe,
            f"grpo.seed={seed}",
            f"exp_manager.exp_dir={folder}",
            "exp_manager.name=run",
            "exp_manager.version=0",
            *arguments.overrides,
        ]
        started = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - started
        steps = [json.loads(line) for line in (Path(folder) / "run/0/metrics.jsonl").read_text().splitlines()]
    name = next(key for key in steps[0] if key.startswith("eval/") and "/avg@" in key)
    evaluated = [step for step in steps if step.get(name) is not None]
    first, last = evaluated[0], evaluated[-1]
    greedy = name.rsplit("/", 1)[0] + "/greedy"
    timed = [step for step in steps if step.get("time/step")]

    def middle(key: str) -> float:
        return sorted(step[key] for step in timed)[len(timed) // 2]

    return {
        "seed": seed,
        "first": first[name],
        "last": last[name],
        "first_greedy": first[greedy],
        "last_greedy": last[greedy],
        "steps": len(timed),
        "seconds": seconds,
        "generate": middle("time/generate"),
        "train": middle("time/train"),
        "sync": middle("time/sync_weights"),
    }


def table(rows: list[dict[str, float]], arguments: argparse.Namespace) -> str:
    """Markdown."""
    recipe = f"`{arguments.recipe}` {' '.join(arguments.overrides)}".rstrip()
    lines = [
        f"{recipe}: held-out accuracy, greedy and sampled (avg@1), and median seconds of a step's phases.",
        "",
        "| seed | greedy at the start | at the end | sampled at the start | at the end | steps | whole command "
        "| generate | train | weight sync |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracies = [row[name] for name in ("first_greedy", "last_greedy", "first", "last")]
        cells = [str(row["seed"]), *(f"{value:.3f}" for value in accuracies), str(row["steps"])]
        cells += [f"{row['seconds']:.0f} s", *(f"{row[phase]:.2f} s" for phase in ("generate", "train", "sync"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
