"""`vespo-megatron train` on the card, whole: steps, a checkpoint, and going on after it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from command_line import make_folder
from tiny_model import write_tiny_qwen3_moe

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(200)]
ROOT = Path(__file__).parents[2]
ONE_PROCESS = {
    "policy.megatron_cfg.tensor_model_parallel_size": 1,
    "policy.megatron_cfg.sequence_parallel": "false",
    "policy.megatron_cfg.expert_model_parallel_size": 1,
    "cluster.gpus_per_node": 1,
    "cluster.device": "cuda",
    "exp_manager.version": "run",
    "exp_manager.resume_if_exists": "true",
    "env.reward": "rewards_of_mine:spread",
    "checkpointing.save_period": 2,
}


def start(folder, name, steps, **values):
    settings = ONE_PROCESS | {"grpo.max_num_steps": steps, "exp_manager.name": name} | values
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "vespo_megatron.cli", "train", str(folder / "recipe.yaml"), *overrides],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def ended(process):
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output[-3000:]
    return output


def metrics(folder, name):
    lines = (folder / "runs" / name / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tmp_path_factory.mktemp("model")
    write_tiny_qwen3_moe(model)
    return make_folder(tmp_path_factory.mktemp("run"), model)


def test_a_run_is_the_same_when_it_is_stopped_and_goes_on(folder, note):
    whole, first = start(folder, "whole", 4), start(folder, "parts", 2)
    rounded = start(folder, "rounded", 2, **{"policy.precision": "bfloat16"})
    output = ended(whole)
    assert "1 processes on cuda" in output and "(cuda:0, float32)" in output
    ended(first)
    assert "resuming after step 2" in ended(start(folder, "parts", 4))
    ended(rounded)
    ours, theirs = metrics(folder, "whole"), metrics(folder, "parts")
    assert [row["step"] for row in theirs] == [1, 2, 3, 4]
    names = [name for name in ours[-1] if not name.startswith(("time/", "throughput/", "memory/", "timestamp"))]
    differing = {
        name: (ours[-1][name], theirs[-1].get(name)) for name in names if ours[-1][name] != theirs[-1].get(name)
    }
    note(compared=len(names), differing=len(differing))
    assert ours[-1]["loss/grad_norm"] == pytest.approx(theirs[-1]["loss/grad_norm"], rel=1e-3)
    for row in (*ours, *metrics(folder, "rounded")):
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert all(math.isfinite(value) for value in numbers) and row["memory/train"] > 0


def test_a_run_on_the_host_of_a_machine_with_a_card_stays_there(folder):
    output = ended(start(folder, "host", 1, **{"cluster.device": "cpu"}))
    assert "1 processes on cpu" in output and "(cpu, float32)" in output
