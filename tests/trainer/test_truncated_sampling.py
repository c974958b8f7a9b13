"""Runs whose sampling truncates: π over the tokens that μ could draw, so that the first update is on-policy."""

from __future__ import annotations

import numpy as np
import pytest
import resume_work
from made_up_sample import sample

from vespo_megatron.data.batch import Batch
from vespo_megatron.run.metrics_file import read_metrics
from vespo_megatron.trainer import bundle

TRUNCATED = ("policy.generation.top_p=0.8", "policy.generation.top_k=40", "policy.generation.temperature=0.9")
pytestmark = pytest.mark.timeout(600)


def first_steps(run_dir):
    resume_work.finish(run_dir)
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2]
    return rows


def make_run(folder, name, *overrides):
    return resume_work.make_run(
        folder,
        name,
        "grpo.max_num_steps=2",
        "grpo.num_prompts_per_step=4",
        "grpo.num_generations_per_prompt=4",
        "policy.train_global_batch_size=8",
        "policy.megatron_cfg.optimizer.lr=1e-2",
        *TRUNCATED,
        *overrides,
    )


@pytest.mark.parametrize("behavior", ["rollout", "recompute"])
def test_at_equal_weights_the_importance_weight_is_one(behavior, importable):
    for row in first_steps(make_run(importable, behavior, f"loss_fn.behavior={behavior}")):
        assert row["vespo/w_mean_first_update"] == pytest.approx(1.0, abs=1e-4)
        assert row["mismatch/k3_first_update"] < 1e-9
        assert row["vespo/w_mean_last_update"] != pytest.approx(1.0, abs=1e-4), "nothing was learnt"


PRUNED = ("policy.generation.top_p=1.0", "policy.generation.top_k=null", "policy.generation.min_p=0.3")


def test_with_a_pruned_vocabulary_too(importable):
    for row in first_steps(make_run(importable, "pruned", "loss_fn.behavior=rollout", *PRUNED)):
        assert row["vespo/w_mean_first_update"] == pytest.approx(1.0, abs=1e-4)
        assert row["mismatch/k3_first_update"] < 1e-9


@pytest.mark.sglang
def test_with_sglang_s_real_server(importable, sglang_servers):
    run_dir = make_run(
        importable,
        "sglang",
        "policy.generation.backend=sglang",
        f"policy.generation.sglang_cfg.urls={sglang_servers.urls}",
        "policy.max_total_sequence_length=128",
        "policy.generation.sglang_cfg.weight_bucket_bytes=65536",
    )
    for row in first_steps(run_dir):
        assert row["vespo/w_mean_first_update"] == pytest.approx(1.0, abs=1e-3)


def test_a_skipped_update_is_kept_with_what_its_tokens_were_drawn_from(tmp_path, tiny_recipe):
    batch = Batch([sample(1), sample(2)], np.ones(2, dtype=np.float32))
    batch.samples[1].sampling_mask = None
    bundle.write(tmp_path, bundle.Bundle(tiny_recipe, 1, 0, "", batch))
    first, second = bundle.read(tmp_path).batch.samples
    assert second.sampling_mask is None and second.turns.tolist() == [0, -1, 1]
    assert second.turn_rewards.tolist() == [0.5, 1.0] and second.turn_advantages.tolist() == [-1.0, 0.25]
    assert first.sampling_mask.counts.tolist() == [2, 0, 1] and first.sampling_mask.ids.tolist() == [3, 9, 5]
