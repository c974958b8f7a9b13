"""Engine against trainer, with R3 and without: SGLang in bfloat16, megatron-core in float32, several seeds.

    python benchmarks/bench_mismatch.py --seeds 1 2 3 --record

Per seed one `vespo-megatron mismatch`: the same samples scored twice, by live routers and with the engine's routes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from vespo_megatron.trainer.mismatch_table import COLUMNS, FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipe", default="examples/tiny_moe/vespo.yaml")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    lines = [
        f"`vespo-megatron mismatch {arguments.recipe} policy.generation.sglang_cfg.dtype=bfloat16`, means over "
        f"{arguments.batches} rollout batches per seed.",
        "",
    ]
    names: list[str] = []
    for seed in arguments.seeds:
        rows = run(seed, arguments)
        if not names:
            names = [name for name in COLUMNS if name in rows[0]]
            lines += [
                "| seed | replay | " + " | ".join(COLUMNS[n] for n in names) + " |",
                "|---" * (len(names) + 2) + "|",
            ]
        for mode in ("none", "R3"):
            members = [row for row in rows if row["replay"] == mode]
            means = [sum(row[name] for row in members) / len(members) for name in names]
            lines.append(f"| {seed} | {mode} | " + " | ".join(f"{mean:.5g}" for mean in means) + " |")
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        from results import record

        record("Train-inference mismatch with R3 and without", text)


def run(seed: int, arguments: argparse.Namespace) -> list[dict]:
    """Measure once in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "vespo_megatron.cli",
            "mismatch",
            f"--batches={arguments.batches}",
            arguments.recipe,
            f"grpo.seed={seed}",
            "policy.generation.sglang_cfg.dtype=bfloat16",
            f"exp_manager.exp_dir={folder}",
            "exp_manager.name=run",
            "exp_manager.version=0",
        ]
        subprocess.run(command, check=True)
        return json.loads((Path(folder) / "run/0" / FILE).read_text())


if __name__ == "__main__":
    main()
