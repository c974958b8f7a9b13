"""A quantised trainer beside SGLang's real server: as near to each other as without, where both round alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vespo_megatron.trainer.mismatch_table import FILE

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "plain": (),
    "int4": ("policy.quantization.scheme=int4", "policy.quantization.group_size=32"),
    "fp8_e4m3": ("policy.quantization.scheme=fp8_e4m3",),
    "int4, rollouts alone": (
        "policy.quantization.scheme=int4",
        "policy.quantization.group_size=32",
        "policy.quantization.where=rollout",
    ),
}


def measured(folder: Path, *overrides: str) -> tuple[float, float]:
    """(k3, route agreement) without replay, means over two batches."""
    command = [
        *(sys.executable, "-m", "vespo_megatron.cli", "mismatch", "examples/tiny_moe/vespo.yaml", "--batches", "2"),
        *(f"exp_manager.exp_dir={folder}", "exp_manager.name=run", "exp_manager.version=main", *overrides),
        *("grpo.num_prompts_per_step=16", "policy.train_global_batch_size=64", "policy.precision=float32"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in json.loads((folder / "run" / "main" / FILE).read_text()) if row["replay"] == "none"]
    assert len(rows) == 2
    return (sum(row["mismatch/k3"] for row in rows) / 2, sum(row["routes/agreement"] for row in rows) / 2)


@pytest.mark.nightly
@pytest.mark.timeout(1300)
def test_rounded_on_both_sides_k3_and_routes_are_those_of_float32(tmp_path):
    found = {}
    for name, overrides in SETTINGS.items():
        found[name] = measured(tmp_path / name.replace(" ", "_"), *overrides)
        print(name, found[name], flush=True)
    k3, agreement = found["plain"]
    assert k3 < 1e-9 and agreement > 0.999
    for name in ("int4", "fp8_e4m3"):
        assert found[name][0] < max(10 * k3, 1e-12), found
        assert found[name][1] >= agreement - 1e-3, found
    assert found["int4, rollouts alone"][0] > 1e-4 and found["int4, rollouts alone"][1] < 0.99, found
