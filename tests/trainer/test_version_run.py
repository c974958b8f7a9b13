"""`behavior: version` in whole asynchronous runs of two processes: nightly, for a run takes its ten seconds each."""

from __future__ import annotations

import pytest
from command_line import started

from vespo_megatron.run.metrics_file import read_metrics

MEGATRON = "policy.megatron_cfg"
LAYOUTS = {
    "tp2_ep2": (),
    "pp2": (
        "tensor_model_parallel_size=1",
        "sequence_parallel=false",
        "expert_model_parallel_size=1",
        "pipeline_model_parallel_size=2",
        "num_layers_in_first_pipeline_stage=2",
    ),
    "cp2": ("tensor_model_parallel_size=1", "sequence_parallel=false", "context_parallel_size=2"),
}
VERSIONS = (
    "loss_fn.behavior=version",
    "grpo.async_grpo.enabled=true",
    "grpo.async_grpo.max_staleness=2",
    "grpo.async_grpo.sync_every=2",
    "grpo.num_generations_per_prompt=4",
    "env.reward=rewards_of_mine:spread",
    "checkpointing.save_period=3",
    "exp_manager.version=main",
    "exp_manager.resume_if_exists=true",
    "logger.tensorboard_enabled=false",
    f"{MEGATRON}.optimizer.lr=3e-3",
)


@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.parametrize("replay", ["none", "R2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_is_scored_by_the_weights_that_drew_it(layout, replay, folder):
    """In float32 the two engines agree to rounding, so π_old of those weights is μ; the last steps follow a resume.

    It is from the middle of a version: one step was trained on it, and the second follows.
    """
    overrides = [*VERSIONS, f"policy.router_replay.mode={replay}", *(f"{MEGATRON}.{each}" for each in LAYOUTS[layout])]
    for steps in (5, 10):
        with started(folder, *overrides, f"grpo.max_num_steps={steps}") as process:
            assert process.wait(180) == 0, (folder / "err").read_text()
    rows = [row for row in read_metrics(folder / "runs" / "bad" / "main") if row["step"]]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert max(row["staleness/lag_max"] for row in rows) == 2
    assert max(row["staleness/k3"] for row in rows) > 0.01, "the weights hardly moved"
    assert max(row["mismatch/prob_diff_max"] for row in rows) < 2e-5


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_rounded_on_both_sides_too(folder):
    """Earlier versions' weights are rounded as the engine's were."""
    overrides = [*VERSIONS, "policy.quantization.scheme=int4", "policy.quantization.group_size=32"]
    with started(folder, *overrides, "grpo.max_num_steps=6") as process:
        assert process.wait(180) == 0, (folder / "err").read_text()
    rows = [row for row in read_metrics(folder / "runs" / "bad" / "main") if row["step"]]
    assert max(row["staleness/lag_max"] for row in rows) == 2
    assert max(row["staleness/k3"] for row in rows) > 0.01, "the weights hardly moved"
    assert max(row["mismatch/prob_diff_max"] for row in rows) < 2e-5
    assert min(row["routes/agreement"] for row in rows) > 0.999
