"""A recipe run whole on this machine, scaled down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe" / "build"


def assert_it_runs(recipe: Path, folder: Path) -> None:
    """Two steps of it in `folder`, each logged."""
    command = [sys.executable, "-m", "vespo_megatron.cli", "train", "--scale-down", str(TINY), str(recipe)]
    command += ["policy.generation.backend=in_process", "exp_manager.resume_if_exists=false"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = [json.loads(line) for file in folder.rglob("metrics.jsonl") for line in file.read_text().splitlines()]
    assert [line["step"] for line in metrics if line["step"]] == [1, 2]
