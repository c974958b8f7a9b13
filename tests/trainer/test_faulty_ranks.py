"""One rank of eight fails: the run skips or ends in time, the culprit is named, and nothing stays behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import of_this_run, started

from vespo_megatron.run.processes import wait_until

EIGHT_RANKS = (
    "cluster.gpus_per_node=8",
    "policy.megatron_cfg.tensor_model_parallel_size=2",
    "policy.megatron_cfg.expert_model_parallel_size=2",
    "policy.megatron_cfg.context_parallel_size=2",
    "grpo.max_num_steps=6",
    "env.reward=rewards_of_mine:spread",
    "logger.tensorboard_enabled=false",
)
TIMEOUT = 10.0
PROGRAM = ("-c", "import sys, faulty_ranks; sys.exit(faulty_ranks.train())")
pytestmark = [pytest.mark.parallel, pytest.mark.timeout(300)]


def run(folder: Path, fault: str) -> tuple[int, float, str]:
    """(status, seconds from the last finished step to the end, messages) of a run whose rank 5 fails in step 4."""
    shutil.copy(Path(__file__).with_name("faulty_ranks.py"), folder)
    overrides = [
        *EIGHT_RANKS,
        "loss_fn.behavior=rollout",  # the fault is in the fourth step's first forward: of an update, then
        f"exp_manager.name={fault}",
        f"cluster.watchdog_timeout={TIMEOUT}",
    ]
    metrics = folder / "runs" / fault / "version_0" / "metrics.jsonl"
    with started(folder, *overrides, program=PROGRAM) as process:
        assert wait_until(lambda: process.poll() is not None or steps(metrics) >= 3, 200), "never reached step 3"
        since = time.monotonic()
        status = process.wait(120)
        seconds = time.monotonic() - since
        assert wait_until(lambda: not of_this_run(folder), 10), of_this_run(folder)
    return status, seconds, (folder / "err").read_text() + (folder / "out").read_text()


def steps(metrics: Path) -> int:
    return metrics.read_text().count("\n") if metrics.exists() else 0


def test_a_rank_with_nan_gradients_is_skipped_and_a_rank_that_hangs_in_c_is_named(folder):
    status, seconds, messages = run(folder, "hang")
    run_dir = folder / "runs" / "hang" / "version_0"
    # Rank 3's gradients in step 2: skipped on every rank, counted, kept; training went on.
    assert "step 2, update 0: not finite: gradient of rank 3; skipped" in messages, messages
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss/skipped_updates"] for row in rows] == [0, 1, 0], rows
    assert rows[1]["loss/grad_norm"] is None and rows[2]["loss/grad_norm"] > 0
    # Rank 5 hung in step 4, holding the interpreter's lock.
    assert status == 70, messages
    assert "rank 5 hangs in phase train of step 4: no progress for 1" in messages, messages
    assert seconds < TIMEOUT + 40
    report = (run_dir / "watchdog" / "stall.txt").read_text()
    assert report.count("  rank ") == 8 and "all_" in report and "faulty_ranks.py" in report, report
    assert all((run_dir / "watchdog" / f"rank_{rank}.stacks.txt").stat().st_size for rank in range(8))
    # The bundle of step 2 on one process: the samples are fine, hence it was the rank.
    bundle = run_dir / "bundles" / "step-2-update-0"
    replay = subprocess.run(
        [sys.executable, "-m", "vespo_megatron.cli", "replay-step", str(bundle)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert replay.returncode == 0, replay.stderr
    assert "step 2, update 0: not finite in the run: gradient of rank 3" in replay.stdout
    assert "all of its 8 samples are finite on one process: look at the rank" in replay.stdout


def test_a_rank_killed_outright_is_named_with_its_phase(folder):
    status, seconds, messages = run(folder, "kill")
    assert status == 1
    assert "rank 5 was ended by SIGKILL in phase train of step 4" in messages, messages
    assert "Traceback" not in messages.split("vespo-megatron: rank 5")[1]
    assert seconds < TIMEOUT + 40
