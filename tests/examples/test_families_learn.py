"""`make train` with a tiny model of every family: reward alone teaches it to reckon."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from vespo_megatron.cli import main
from vespo_megatron.run.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny_moe"
ROUTERS = ("mixtral", "olmoe", "glm4_moe")


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", [*ROUTERS, "llama", "qwen3"])
def test_reward_teaches_a_tiny_model_of_the_family(family, tmp_path, monkeypatch):
    """From guesses to more than 0.5 greedily in 12 steps; the engines agree all the way."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(EXAMPLE)
    prepare = importlib.import_module("prepare")
    try:
        prepare.prepare(tmp_path / "build", family=family)
    finally:
        for name in ("prepare", "running_sums", "tiny_models"):
            del sys.modules[name]
    recipe = "vespo" if family in ROUTERS else "dense"
    arguments = ["train", f"examples/tiny_moe/{recipe}.yaml", f"policy.model_name={tmp_path / 'build' / 'model'}"]
    arguments += [f"exp_manager.exp_dir={tmp_path / 'runs'}", "policy.generation.backend=in_process"]
    arguments += ["grpo.max_num_steps=12", "grpo.val_period=12", "checkpointing.save_hf=false"]
    if family in ROUTERS:
        arguments += ["policy.router_replay.mode=R3"]
    else:
        arguments += ["policy.generation.sglang_cfg.enable_return_routed_experts=false"]
    assert main(arguments) == 0
    rows = read_metrics(next((tmp_path / "runs").rglob("metrics.jsonl")).parent)
    before, after = rows[0]["eval/running_sums/greedy"], rows[-1]["eval/running_sums/greedy"]
    print(f"{family}: {before:.3f} to {after:.3f} greedily")
    assert before < 0.2 and after > 0.5
    assert all(row["mismatch/k3"] < 1e-4 for row in rows if "mismatch/k3" in row)
