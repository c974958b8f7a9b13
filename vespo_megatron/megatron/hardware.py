"""GPU data sheets, and the assumed share of them that training and generation reach."""

from __future__ import annotations

from dataclasses import dataclass

from vespo_megatron.errors import UserError


@dataclass(frozen=True)
class GPU:
    """One device. Rates are per second."""

    name: str
    memory_gib: float
    bf16_tflops: float
    """Dense, without sparsity."""
    memory_tb: float
    """Bandwidth in terabytes."""
    network_gb: float = 50.0
    """To another node, one direction: one 400 Gb/s adapter per GPU."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA's datasheets: A100, H100 SXM, H200, H20, B200.
        GPU("a100-80", 80, 312, 2.04, 25),
        GPU("h100-80", 80, 989, 3.35),
        GPU("h200-141", 141, 989, 4.8),
        GPU("h20-96", 96, 148, 4.0),
        GPU("b200-180", 180, 2250, 8.0),
    )
}

USABLE_MEMORY = 0.92
"""Of the device: the rest is CUDA's context, NCCL's buffers and what the allocator cannot give out."""
TRAINING_MFU = 0.25
"""Assumed model FLOPs utilisation. Not measured: no GPU run of this project stands behind it; `--mfu` changes it."""
DECODE_BANDWIDTH = 0.5
"""Assumed share of memory bandwidth that decoding reaches."""


def gpu(name: str) -> GPU:
    """By name. Raises UserError naming those there are."""
    if name not in GPUS:
        raise UserError(f"{name!r} is not known", where="--gpu", expected=", ".join(GPUS))
    return GPUS[name]


def peak_tflops(device_name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of the device CUDA calls by this name, as in "NVIDIA H100 80GB HBM3"; None if unknown."""
    known = named(device_name)
    return None if known is None else known.bf16_tflops


def named(device_name: str) -> GPU | None:
    """What CUDA calls by this name; None if unknown."""
    words = device_name.upper().replace("-", " ").split()
    return next((known for name, known in GPUS.items() if name.split("-")[0].upper() in words), None)
