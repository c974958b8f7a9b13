"""A long run in short: 5,000 steps of a minute model, with every process' memory, files and threads watched."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vespo_megatron.run.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = int(os.environ.get("SOAK_STEPS", "5000"))
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(7200)]


def look(process: psutil.Process) -> dict[str, tuple[int, int, int]]:
    """(resident bytes, open files, threads) of the process and all below it, by command line."""
    found = {}
    for each in [process, *process.children(recursive=True)]:
        try:
            name = " ".join(each.cmdline())[-120:]
            found[f"{name} #{each.pid}"] = (each.memory_info().rss, each.num_fds(), each.num_threads())
        except psutil.NoSuchProcess:
            continue
    return found


def test_nothing_grows(tmp_path):
    """Resident memory within 2% after the first tenth, files and threads not at all."""
    command = [
        sys.executable,
        "-m",
        "vespo_megatron.cli",
        "train",
        "examples/tiny_moe/in_process.yaml",
        f"exp_manager.exp_dir={tmp_path}",
        "exp_manager.version=one",
        f"grpo.max_num_steps={STEPS}",
        "grpo.num_prompts_per_step=2",
        "grpo.num_generations_per_prompt=2",
        "policy.train_global_batch_size=2",
        "policy.generation.max_new_tokens=6",
        "policy.max_total_sequence_length=64",
        "grpo.val_period=200",
        "grpo.max_val_samples=4",
        "checkpointing.enabled=true",
        "checkpointing.save_period=500",
        "checkpointing.keep_top_k=2",
        "logger.progress=false",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        seen: dict[str, list[tuple[int, int, int]]] = {}
        try:
            while process.poll() is None:
                if newest := [row["step"] for row in read_metrics(tmp_path / "tiny_moe_in_process" / "one")][-1:]:
                    if newest[0] > STEPS // 10:
                        for name, values in look(psutil.Process(process.pid)).items():
                            seen.setdefault(name, []).append(values)
                time.sleep(max(1.0, STEPS / 1000))
        finally:
            process.kill()
    assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    lasting = {name: values for name, values in seen.items() if len(values) >= 0.8 * max(map(len, seen.values()))}
    assert len(lasting) >= 3, f"launcher, agent and trainer at least: {list(lasting)}"
    for name, values in lasting.items():
        quarter = max(1, len(values) // 4)
        first, last = values[:quarter], values[-quarter:]
        memory = [statistics.median(value[0] for value in part) for part in (first, last)]
        print(f"{name}: {memory[0] / 2**20:.1f} → {memory[1] / 2**20:.1f} MiB, files and threads {values[-1][1:]}")
        assert memory[1] <= 1.02 * memory[0], name
        for which in (1, 2):  # a file that is open for a moment is no leak
            assert statistics.median(value[which] for value in last) <= max(value[which] for value in first), name
