"""A whole launch on a node of made-up GPUs: who has which, and in what order memory is taken and given back."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_node import NODE, FakeNode, write_interpreter

from vespo_megatron.launch import launcher
from vespo_megatron.run.metrics_file import read_metrics

TESTS = Path(__file__).parents[1]
SERVERS = "policy.generation.sglang_cfg"


@pytest.fixture
def launched(folder, monkeypatch):
    """Runs the folder's recipe of two steps with evaluation on that node; returns the node and the run directory."""

    def launch(gpus, *overrides):
        monkeypatch.setenv(NODE, str(folder))
        monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{folder}")
        monkeypatch.setattr(launcher, "gpu_count", lambda: gpus)
        monkeypatch.setattr(launcher, "WORKER_MODULE", "fake_worker")
        given = (
            "grpo.max_num_steps=2",
            "grpo.val_period=1",
            "grpo.seed=0",
            f"data.validation.path={folder}/train.jsonl",
            "cluster.device=cuda",
            "policy.generation.backend=sglang",
            f"{SERVERS}.python={write_interpreter(folder, gpus=gpus)}",
            f"{SERVERS}.weight_transport=disk",
            f"{SERVERS}.mem_fraction_static=0.9",
            f"{SERVERS}.startup_timeout=120",
            "logger.tensorboard_enabled=false",
            "checkpointing.enabled=false",
            *overrides,
        )
        run_dir = launcher.train(folder / "recipe.yaml", given)
        return FakeNode(folder), run_dir

    return launch


SHARE = "weights kv_cache cuda_graph".split()
START = [f"server 0: {' '.join(f'+{each}' for each in SHARE)}", f"server 0: {' '.join(f'-{each}' for each in SHARE)}"]
BUILD = ["trainer 0: +parameters +gradients +optimizer", "trainer 0: -gradients -optimizer"]
UPDATE = [
    "server 0: +weights",
    "trainer 0: +buckets",
    "trainer 0: -buckets -parameters",
    "server 0: +kv_cache +cuda_graph",
]
STEP = [
    START[1],
    "trainer 0: +parameters +gradients +optimizer +activations",
    "trainer 0: -activations -gradients -optimizer",
    *UPDATE,
    "server 0: generate",
]
"""From the end of a rollout to the next; a step's evaluation is in the servers' same turn."""


def in_turn(lines):
    """Without repetitions of one after another, such as calls of one rollout."""
    return [line for index, line in enumerate(lines) if index == 0 or line != lines[index - 1]]


@pytest.mark.timeout(300)
def test_a_colocated_run_takes_turns_and_a_dead_server_waits_for_its_own(launched, monkeypatch, capfd):
    """Server 1 dies when it is asked for its memory after the first rollout, and may not start beside the trainer."""
    monkeypatch.setenv("VESPO_FAKE_DEATH", "server 1 2")
    node, run_dir = launched(2, f"{SERVERS}.colocated=true", f"{SERVERS}.num_servers=2")
    assert not [event for event in node.events() if "no room" in event[3]]
    assert in_turn(node.on_gpu("0")) == [*START, *BUILD, *UPDATE, "server 0: generate", *STEP, *STEP]
    output = capfd.readouterr().out
    assert "GPUs of this node: trainer on 0, 1; server 0 on 0; server 1 on 1" in output
    assert "it starts again when the trainer leaves its devices" in output and "restart 1 of 3" in output
    assert [row["step"] for row in read_metrics(run_dir)] == [0, 1, 2]
    second = node.on_gpu("1")
    dies = second.index("server 1: dies")
    back = second.index("server 1: +weights +kv_cache +cuda_graph", dies)
    assert second[back - 1].endswith("-parameters"), "the trainer had left the GPU"
    assert "server 1: generate" in second[back:], "it is updated with the others"


@pytest.mark.timeout(300)
def test_servers_on_gpus_of_their_own_keep_what_they_have(launched, capfd):
    node, run_dir = launched(3)
    assert [row["step"] for row in read_metrics(run_dir)] == [0, 1, 2]
    assert "GPUs of this node: trainer on 0, 1; server 0 on 2" in capfd.readouterr().out
    assert in_turn(node.on_gpu("2")) == [START[0], "server 0: generate"]
    step = ["trainer 0: +activations", "trainer 0: -activations", "trainer 0: +buckets", "trainer 0: -buckets"]
    assert in_turn(node.on_gpu("0")) == [f"{BUILD[0]} +buckets", step[-1], *step, *step]
