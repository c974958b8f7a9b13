"""Whole runs with one quantiser on both sides: mismatch of rounding alone, what is saved, and resuming to the bit."""

from __future__ import annotations

import json
import os
import random

import pytest
import resume_work
from safetensors.torch import load_file

from vespo_megatron.quantization import fake_quantize
from vespo_megatron.run.metrics_file import read_metrics

OVERRIDES = (
    "policy.quantization.scheme=int4",
    "policy.quantization.group_size=32",
    "grpo.max_num_steps=3",
    "grpo.num_prompts_per_step=3",
    "grpo.num_generations_per_prompt=4",
    "policy.train_global_batch_size=4",
    "loss_fn.behavior=recompute",
    "loss_fn.reference_policy_kl_penalty=0.01",
    "policy.megatron_cfg.optimizer.lr=3e-3",
    "checkpointing.save_period=1",
    "checkpointing.save_hf=true",
)
TIMES = ("wall_time", "time/", "memory/", "throughput/", "checkpoint/")


def outcome(run_dir):
    """(metrics of every step but times, the weights that were saved last)."""
    rows = read_metrics(run_dir)
    kept = [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]
    return kept, (run_dir / "checkpoints" / "final_hf" / "model-00001.safetensors").read_bytes()


@pytest.mark.timeout(400)
def test_a_run_has_the_control_s_mismatch_saves_its_own_weights_and_resumes_to_the_bit(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.syspath_prepend(folder)
    whole = resume_work.make_run(folder, "whole", *OVERRIDES)
    resume_work.finish(whole)
    rows, _ = expected = outcome(whole)
    assert len(rows) == 3 and any(row["loss/grad_norm"] > 0 for row in rows)
    print([row["mismatch/k3"] for row in rows])
    assert all(row["mismatch/k3"] < 1e-9 for row in rows)
    kept = load_file(whole / "checkpoints" / "final_hf" / "model-00001.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    start = load_file(folder / "model" / "model.safetensors")[name]
    assert 0 < (kept[name] - start).abs().max() < 0.1
    assert (fake_quantize(kept[name], "int4", 32) - kept[name]).abs().max() > 1e-3
    facts = json.loads((whole / "summary.json").read_text())["facts"]
    assert facts["weights"] == "int4 (groups of 32) in training and rollouts"

    killed = resume_work.make_run(folder, "killed", *OVERRIDES)
    assert resume_work.kill_in(killed, resume_work.start(killed), "train", 2, random.Random(1))
    resume_work.finish(killed)
    assert outcome(killed) == expected
