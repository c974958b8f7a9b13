"""Which groups a run trained on in which step, and which it gave up: written down as it happens, through kills."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vespo_megatron.controller.staleness import StalenessBuffer
from vespo_megatron.run.checkpoint_store import CheckpointStore
from vespo_megatron.trainer.checkpoint import CONTROLLER

_FILE = "groups.jsonl"


def write_groups_down(run_dir: str) -> None:
    """In the process of the run, before it begins."""

    def note(kind, step, numbers):
        with open(Path(run_dir) / _FILE, "a") as file:
            file.write(json.dumps([kind, step, numbers]) + "\n")

    take, abort = StalenessBuffer.take, StalenessBuffer.abort

    def noted_take(buffer):
        groups = take(buffer)
        note("trained", buffer.counts.trained // buffer.batch_groups, [group.number for group in groups])
        return groups

    def noted_abort(buffer, group):
        abort(buffer, group)
        note("aborted", buffer.counts.trained // buffer.batch_groups, [group.number])

    StalenessBuffer.take, StalenessBuffer.abort = noted_take, noted_abort


def check_groups(run_dir: Path, steps: int) -> None:
    """Of what the run has kept, every group that was sent is trained on once, or still held by the last checkpoint."""
    trained: dict[int, list[int]] = {}
    for line in (run_dir / _FILE).read_text().splitlines():
        kind, step, numbers = json.loads(line)
        assert kind == "trained", line
        trained[step] = numbers  # a step that was lost with its process is trained again
    assert sorted(trained) == list(range(1, steps + 1))
    newest = next(iter(CheckpointStore(run_dir / "checkpoints").checkpoints().values()))
    buffer = torch.load(newest / CONTROLLER, weights_only=True)["buffer"]
    held = [group["number"] for group in buffer["groups"]]
    everything = [number for numbers in trained.values() for number in numbers] + held
    assert sorted(everything) == list(range(buffer["counts"]["sent"]))
