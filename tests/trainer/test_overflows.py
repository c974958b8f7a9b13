"""A run in float16 whose gradients overflow: skipped and told while the scale falls, one error where it cannot."""

from __future__ import annotations

import json
from itertools import accumulate

import pytest
from command_line import of_this_run, started

from vespo_megatron.run.processes import wait_until

pytestmark = pytest.mark.timeout(300)
HALF = (
    "policy.precision=float16",
    "policy.megatron_cfg.optimizer.initial_loss_scale=4294967296",
    "policy.megatron_cfg.optimizer.hysteresis=1",
    "env.reward=rewards_of_mine:spread",
    "logger.tensorboard_enabled=false",
)


def run(folder, *overrides):
    """(status, rows of metrics, messages)"""
    with started(folder, *HALF, *overrides) as process:
        status = process.wait(250)
        assert wait_until(lambda: not of_this_run(folder), 10), of_this_run(folder)
    metrics = next((folder / "runs").rglob("metrics.jsonl"), None)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics else []
    return status, rows, (folder / "err").read_text() + (folder / "out").read_text()


@pytest.mark.parallel
def test_two_ranks_skip_alike_tell_it_and_go_on(folder):
    status, rows, messages = run(folder, "grpo.max_num_steps=24", "checkpointing.save_hf=false")
    assert status == 0, messages
    overflows = [row["loss/overflows"] for row in rows]
    count = int(sum(overflows))
    assert 4 < count < 24 and overflows[:5] == [1.0] * 5 and overflows[-1] == 0.0
    before = accumulate([0.0, *overflows[:-1]])
    assert [row["loss/scale"] for row in rows] == [2.0 ** (32 - halved) for halved in before]
    assert [row["loss/updates"] for row in rows] == [1.0 - overflow for overflow in overflows]
    assert all(row["loss/skipped_updates"] == 0 for row in rows)
    assert rows[0]["loss/grad_norm"] is None and rows[-1]["loss/grad_norm"] > 0
    told = [line for line in messages.splitlines() if ": overflow: gradient of rank" in line]
    assert len(told) == count and "step 1, update 0" in told[0] and "at a loss scale of 4.29497e+09; skipped" in told[0]
    assert not list((folder / "runs").rglob("bundles/*"))


def test_at_the_smallest_scale_it_is_a_fault_and_ends_the_run(folder):
    alone = ("tensor_model_parallel_size=1", "expert_model_parallel_size=1", "sequence_parallel=false")
    status, _, messages = run(
        folder,
        *(f"policy.megatron_cfg.{each}" for each in alone),
        "cluster.gpus_per_node=1",
        "policy.megatron_cfg.optimizer.min_loss_scale=2147483648",
        "guard.max_skipped_updates=2",
    )
    assert status == 2 and "Traceback" not in messages, messages
    assert messages.count("2 updates in a row were not finite") == 1
    assert "overflow: gradient of rank 0, at a loss scale of 4.29497e+09; skipped" in messages
    assert "gradient of rank 0, at a loss scale of 2.14748e+09, the smallest that optimizer.min_loss_scale" in messages
    assert len(list((folder / "runs").rglob("bundles/step-*"))) == 2
