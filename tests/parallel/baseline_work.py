"""What the ranks of `test_off_policy_baseline` run."""

from __future__ import annotations

import time
from typing import Any

import torch
from layout_work import build, micro_batches, ragged_batch, weighted_loss

from vespo_megatron.data.batch import Batch
from vespo_megatron.trainer.off_policy_baseline import OffPolicyBaseline


def batch_with_rewards() -> Batch:
    """Four groups of four; one response is masked, one was cut off."""
    batch = ragged_batch()
    for index, sample in enumerate(batch.samples):
        sample.reward = float(index % 3 == 0)
        sample.finish_reason = "length" if index == 6 else "stop"
        if index == 9:
            sample.loss_mask[:] = False
    return batch


def facts_and_advantages(folder: str, layout: dict[str, Any], store: str) -> dict[str, Any]:
    policy = build(folder, layout, store)
    baseline = OffPolicyBaseline(
        policy, torch.distributed.new_group(backend="gloo"), normalize=True, zero_truncated=True
    )
    batches = micro_batches(policy, batch_with_rewards())
    policy.compute_gradients(batches, weighted_loss)  # no matter what was in the buffers
    started = time.perf_counter()
    facts = baseline.facts(batches)
    seconds = time.perf_counter() - started
    baseline.apply(batches)
    made = {
        sample.sample_id: float(value)
        for each in batches
        for sample, value in zip(each.batch.samples, each.advantages, strict=True)
    }
    return {"facts": facts, "advantages": made, "seconds": seconds}
