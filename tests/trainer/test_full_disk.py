"""A run whose disk is full: a small one of its own, in memory."""

from __future__ import annotations

import json
import subprocess

import pytest
import resume_work
from command_line import ROW

from vespo_megatron.run.checkpoint_store import CheckpointStore
from vespo_megatron.run.heartbeat import read_rank_statuses
from vespo_megatron.run.metrics_file import read_metrics

STEPS = 8
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def run_dir(importable):
    """Of a run with everything that is written beside training, on a disk of 32 MB."""
    disk = importable / "runs"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    (importable / "held_out.jsonl").write_text(json.dumps(ROW) + "\n")
    try:
        yield resume_work.make_run(
            importable,
            "full",
            f"grpo.max_num_steps={STEPS}",
            f"data.validation.path={importable}/held_out.jsonl",
            "grpo.val_period=1",
            "logger.tensorboard_enabled=true",
            "checkpointing.save_period=1",
            "checkpointing.keep_top_k=1",
        )
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(path):
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 4096)


def test_a_disk_that_is_full_for_a_while_costs_records_and_no_step(run_dir):
    process = resume_work.start(run_dir)
    resume_work.wait_for_step(run_dir, process, 3)
    fill(run_dir / "filler")
    resume_work.wait_for_step(run_dir, process, 6)
    (run_dir / "filler").unlink()
    process.join(600)
    assert process.exitcode == 0, [path.read_text() for path in (run_dir / "errors").glob("*")]
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert max(row.get("checkpoint/failures", 0) for row in rows) >= 1, "the disk was not full"
    checkpoints = run_dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["final_hf", f"step_{STEPS:06d}"]


def test_a_disk_that_stays_full_is_the_error_of_a_run_that_took_every_step(run_dir):
    process = resume_work.start(run_dir)
    resume_work.wait_for_step(run_dir, process, 3)
    fill(run_dir / "filler")
    process.join(600)
    assert process.exitcode == 2
    assert read_rank_statuses(run_dir)[0].step == STEPS
    checkpoints = CheckpointStore(run_dir / "checkpoints")
    assert 0 < max(checkpoints.checkpoints()) < STEPS, "the last good one stays"
    assert not list(checkpoints.root.glob("*.partial")), "what failed keeps the disk full"
    (run_dir / "filler").unlink()
    resume_work.finish(run_dir)
    assert max(checkpoints.checkpoints()) == STEPS and (checkpoints.root / "final_hf").is_dir()
    assert [row["step"] for row in read_metrics(run_dir)][-1] == STEPS
