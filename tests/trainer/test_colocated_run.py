"""A colocated run with a real SGLang server, which frees nothing on a CPU: who is asked for memory, and when."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import started

from vespo_megatron.rollout_sglang.client.control import call
from vespo_megatron.run.metrics_file import read_metrics

TESTS = Path(__file__).parents[1]
DRIVER = """
import os, sys
os.environ["PYTHONPATH"] = os.pathsep.join([{tests!r}, os.environ["PYTHONPATH"]])
from vespo_megatron import cli
from vespo_megatron.launch import launcher
launcher.WORKER_MODULE = "recording_worker"
sys.exit(cli.main(sys.argv[1:]))
"""
SERVERS = "policy.generation.sglang_cfg"
RANKS = (0, 1)


def of_all(what):
    return {f"rank {rank} {what}" for rank in RANKS}


TAKE_OVER = {"end_weight_update"}
"""Servers that ran before may have been left in the middle of an update."""
RELEASE = {"release_memory weights kv_cache cuda_graph"}
SESSION = [{"resume_memory weights"}, {"begin_weight_update"}, {"end_weight_update"}]
TO_SERVERS = [of_all("parks parameters"), {"resume_memory kv_cache cuda_graph"}, {"generate"}]
PARK = of_all("parks gradients optimizer")
UPDATE = [PARK, *SESSION, *TO_SERVERS]
FIRST = [PARK, SESSION[0], {"end_weight_update"}, *SESSION[1:], *TO_SERVERS]
"""It ends a session that an earlier run may have left open."""
STEP = [RELEASE, of_all("restores gradients optimizer parameters"), *UPDATE]
"""From the end of a rollout to the evaluation after it; the next rollout is in the servers' same turn."""
SAVE = [RELEASE, of_all("restores gradients optimizer parameters")]
"""Servers that were released for it are given the same weights once more."""


def grouped(lines):
    """Sets of what ranks do beside each other, and of what is said several times over."""
    groups: list[set[str]] = []
    for line in lines:
        kind = line if not line.startswith("rank") else line.partition(" ")[2].partition(" ")[2]
        last = next(iter(groups[-1]), "") if groups else ""
        same = kind == (last if not last.startswith("rank") else last.partition(" ")[2].partition(" ")[2])
        if same:
            groups[-1].add(line)
        else:
            groups.append({line})
    return groups


@pytest.mark.sglang
def test_trainer_and_server_are_asked_in_turn(folder, sglang_servers, monkeypatch, tmp_path):
    """Two steps with evaluation, a checkpoint after the first."""
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    overrides = (
        "grpo.max_num_steps=2",
        "grpo.val_period=1",
        f"data.validation.path={folder}/train.jsonl",
        "policy.generation.backend=sglang",
        f"{SERVERS}.urls=[{','.join(sglang_servers.urls)}]",
        f"{SERVERS}.colocated=true",
        f"{SERVERS}.enable_return_routed_experts=true",
        f"{SERVERS}.context_length=128",
        "policy.router_replay.mode=R3",
        "checkpointing.save_period=1",
        "checkpointing.save_hf=true",
        "logger.tensorboard_enabled=false",
        "exp_manager.version=one",
    )
    program = ("-c", DRIVER.format(tests=str(TESTS)))
    try:
        with started(folder, *overrides, program=program) as process:
            assert process.wait(150) == 0, (folder / "err").read_text()
    finally:  # the run leaves the session's server to its trainer, released and paused
        for url in sglang_servers.urls:
            call(url, "/resume_memory_occupation", {"tags": ["weights", "kv_cache", "cuda_graph"]}, timeout_s=30)
            call(url, "/continue_generation", {}, timeout_s=30)
    lines = (tmp_path / "record").read_text().splitlines()
    # The run takes the servers over, has them give their memory back, and ends with its own: its weights are saved.
    assert grouped(lines) == [TAKE_OVER, RELEASE, *FIRST, *STEP, *SAVE, *UPDATE, *STEP, *SAVE]
    rows = read_metrics(folder / "runs" / "bad" / "one")
    assert [row["step"] for row in rows] == [0, 1, 2] and all(row["mismatch/k3"] < 1e-6 for row in rows[1:])
