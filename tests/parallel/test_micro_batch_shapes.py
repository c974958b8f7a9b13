"""How many tokens micro-batches are padded to; no process group and no device is needed for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.layout import shape_bucket
from vespo_megatron.data.sample import Sample
from vespo_megatron.megatron.micro_batch import layouts
from vespo_megatron.megatron.parallel import RankInfo


def rank_info(device: str, **sizes: int) -> RankInfo:
    one = {name: 0 if name.endswith("rank") else 1 for name in RankInfo.__dataclass_fields__ if name != "device"}
    return RankInfo(device=torch.device(device), **one | sizes)


def batch(length: int) -> Batch:
    half = np.full(length, 5)
    sample = Sample(
        sample_id="0",
        prompt_id="0",
        prompt_ids=half,
        response_ids=half,
        behavior_log_probs=np.zeros(length),
        weight_versions=np.zeros(length),
        finish_reason="stop",
    )
    return Batch([sample], np.zeros(1, dtype=np.float32))


@pytest.mark.parametrize("tensor_size", [1, 4])
def test_on_a_gpu_shapes_repeat_and_on_the_host_nothing_is_padded(tensor_size):
    batches = [batch(length) for length in range(480, 512)]
    host = layouts(batches, rank_info("cpu", tensor_size=tensor_size))
    assert len({layout.num_global_tokens for layout in host}) == {1: 32, 4: 17}[tensor_size]
    device = layouts(batches, rank_info("cuda", tensor_size=tensor_size))
    assert {layout.num_global_tokens for layout in device} == {960, 976, 992, 1008, 1024}
    for layout, sizes in zip(device, host, strict=True):
        assert layout.num_global_tokens == shape_bucket(sizes.num_global_tokens)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pipeline_stages_exchange_one_size(device):
    batches = [batch(length) for length in (30, 500, 120)]
    (size,) = {layout.num_global_tokens for layout in layouts(batches, rank_info(device, pipeline_size=2))}
    assert size == {"cpu": 1000, "cuda": 1008}[device]
