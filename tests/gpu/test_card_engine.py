"""The in-process engine on the card: what it says of its tokens is what the trainer says there."""

from __future__ import annotations

import asyncio

import layout_work
import numpy as np
import policy_work
import pytest
import torch

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.sample import Sample
from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams
from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine

LENGTHS = ((5, 12), (3, 1), (30, 60), (1, 7), (9, 20), (14, 33), (2, 2), (21, 16))


def generated(engine, version):
    chance = np.random.default_rng(version)
    requests = [
        GenerationRequest(
            f"r{index}",
            tuple(chance.integers(2, layout_work.VOCAB, prompt).tolist()),
            SamplingParams(response, temperature=0.9),
            seed=index,
        )
        for index, (prompt, response) in enumerate(LENGTHS)
    ]
    results = asyncio.run(engine.generate(requests))
    return [
        Sample(
            sample_id=request.request_id,
            prompt_id=request.request_id,
            prompt_ids=np.array(request.prompt_ids),
            response_ids=result.output_ids,
            behavior_log_probs=result.behavior_log_probs,
            weight_versions=result.weight_versions,
            finish_reason=result.finish_reason,
        )
        for request, result in zip(requests, results, strict=True)
    ]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_engine_and_trainer_agree_before_and_after_an_update(precision, checkpoint, device, note):
    dtype = getattr(torch, precision)
    engine = InProcessEngine(checkpoint[0], dtype=dtype, device=device, context_length=128)
    try:
        with policy_work.policy(checkpoint[0], device, precision=precision) as policy:
            for version in (0, 1):
                if version:
                    policy.update(
                        layout_work.micro_batches(policy, layout_work.ragged_batch()), layout_work.weighted_loss
                    )
                    engine.update_weights(policy.exporter.stream(), version)
                samples = generated(engine, version)
                batch = Batch(samples, np.zeros(len(samples), np.float32))
                batches = layout_work.micro_batches(policy, batch, 2)
                gaps = [
                    answer[0] - each.behavior_log_probs
                    for answer, each in zip(policy.log_probs(batches), batches, strict=True)
                ]
                ratios = torch.cat(gaps).double().cpu()
                assert all(sample.weight_versions[0] == version for sample in samples)
                k3 = float((ratios.exp() - 1 - ratios).mean())
                note(version=version, largest=float(ratios.abs().max()), k3=k3)
                assert float(ratios.abs().max()) < 1e-3 if precision == "float32" else abs(k3) < 5e-2
    finally:
        engine.close()
