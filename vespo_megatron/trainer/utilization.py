"""Model FLOPs of a step, and what share of the devices' peak they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vespo_megatron.data.sample import Sample
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.megatron import flops
from vespo_megatron.megatron.hardware import peak_tflops


def utilization(
    samples: Sequence[Sample], shape: ModelShape, *, seconds: float, device: torch.device, devices: int
) -> dict[str, float]:
    """Of updates on `samples` that took `seconds` on `devices`: forward and backward, experts as they are routed.

    `throughput/mfu` where the peak of the device is known. What is recomputed does not count (Chowdhery et al. 2022,
    arXiv 2204.02311, appendix B).
    """
    lengths = [sample.num_tokens for sample in samples]
    work = flops.training(shape, lengths, sum(len(sample.response_ids) for sample in samples))
    rate = work / seconds / devices / 1e12
    metrics = {"throughput/model_tflop": work / 1e12, "throughput/tflops_per_device": rate}
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return metrics | ({"throughput/mfu": rate / peak} if peak else {})
