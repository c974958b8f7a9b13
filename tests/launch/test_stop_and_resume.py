"""SIGTERM in the midst of a real run of two processes: saved, status 75; the same command goes on, in any layout."""

from __future__ import annotations

import json
import signal

import pytest
from command_line import of_this_run, started

from vespo_megatron.run.processes import wait_until

RESUMABLE = (
    "exp_manager.name=stopped",
    "exp_manager.resume_if_exists=true",
    "env.reward=rewards_of_mine:spread",
    "logger.tensorboard_enabled=false",
)
ONE_PROCESS = (
    "policy.megatron_cfg.tensor_model_parallel_size=1",
    "policy.megatron_cfg.sequence_parallel=false",
    "policy.megatron_cfg.expert_model_parallel_size=1",
    "cluster.gpus_per_node=1",
)


@pytest.mark.parallel
def test_a_stopped_run_goes_on_in_another_layout_without_a_gap_or_a_doubled_step(folder):
    run_dir = folder / "runs" / "stopped" / "version_0"

    def steps():
        rows = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
        return [json.loads(row)["step"] for row in rows]

    with started(folder, *RESUMABLE) as process:
        assert wait_until(lambda: process.poll() is not None or len(steps()) >= 2, 120), (folder / "err").read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, (folder / "err").read_text()
    assert wait_until(lambda: not of_this_run(folder), 10), of_this_run(folder)
    last = steps()[-1]
    saved = run_dir / "checkpoints" / f"step_{last:06d}"
    assert (folder / "err").read_text().rstrip().endswith(f"stopped by SIGTERM after step {last}: {saved}")

    more = f"grpo.max_num_steps={last + 2}"
    with started(folder, *RESUMABLE, *ONE_PROCESS, more) as process:
        assert process.wait(120) == 0, (folder / "err").read_text()
    out = (folder / "out").read_text()
    assert "resuming with another cluster.gpus_per_node: 2 → 1\n" in out
    assert f"resuming with another grpo.max_num_steps: 100000 → {last + 2}\n" in out
    assert steps() == list(range(1, last + 3))

    with started(folder, *RESUMABLE, *ONE_PROCESS, more) as process:  # once more: there is nothing left to do
        assert process.wait(120) == 0, (folder / "err").read_text()
    assert steps() == list(range(1, last + 3))
