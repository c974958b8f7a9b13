"""φ predicted from a run's mismatch is the φ the run had, at two doses of mismatch and whatever W is a ratio of.

The model is random, so that the difference is in many tokens and the Gaussian holds; `benchmarks/bench_prediction.py`
has runs of a trained one, where it is in few.
"""

from __future__ import annotations

import pytest
import resume_work

from vespo_megatron.plan.measured_mismatch import read_measured
from vespo_megatron.plan.prediction import check_run, likely_lengths, scenario
from vespo_megatron.run.metrics_file import read_metrics

pytestmark = pytest.mark.timeout(600)


def rounded_run(folder, behavior, weights, group_size):
    """A run whose rollouts come from weights of this format."""
    run_dir = resume_work.make_run(
        folder,
        f"{behavior}_{weights}",
        f"loss_fn.behavior={behavior}",
        "grpo.max_num_steps=2",
        "grpo.num_prompts_per_step=4",
        "grpo.num_generations_per_prompt=32",
        "policy.train_global_batch_size=64",
        "policy.generation.max_new_tokens=16",
        "policy.megatron_cfg.optimizer.lr=1e-4",
        f"policy.generation.mismatch.weights={weights}",
        f"policy.generation.mismatch.group_size={group_size}",
    )
    resume_work.finish(run_dir)
    return run_dir


@pytest.mark.parametrize(("weights", "group_size", "doses"), [("int4", 8, (1.0, 2.0)), ("int6", "null", (0.3, 0.8))])
def test_phi_of_a_run_is_predicted_from_its_mismatch(importable, weights, group_size, doses):
    rollout, recompute = (
        rounded_run(importable, behavior, weights, group_size) for behavior in ("rollout", "recompute")
    )
    for found in check_run(read_measured(rollout, replay="none")):
        assert found.predicted == pytest.approx([found.measured] * 3, abs=0.1), found
    # Staleness is measured on tokens that μ drew, not π_old, where E[W] is not 1: that has to be told.
    for found in check_run(read_measured(recompute, replay="none")):
        assert found.predicted[-1] == pytest.approx(found.measured, abs=0.1), found
    rows = read_metrics(rollout)
    assert all(doses[0] < row["mismatch/k3"] * row["response/length_mean"] < doses[1] for row in rows)
    assert max(row["vespo/phi_mean"] for row in rows) < 0.7
    assert min(row["vespo/phi_mean"] for row in read_metrics(recompute)) > 0.8

    # What the run with π_old has measured of the engines says what the other one's φ was.
    measured = read_measured(recompute, replay="none")
    made = scenario(measured.recipe, measured=measured)
    each = [made.at("rollout", length) for length in likely_lengths(measured.lengths)]
    for sign in ("positive", "negative"):
        was = sum(row[f"vespo/phi_mean_{sign}"] for row in rows) / len(rows)
        assert sum(getattr(one, f"phi_{sign}") for one in each) / len(each) == pytest.approx(was, abs=0.1)
