"""What a card holds in each phase of a colocated run: the table of `trainer/device_turns.py` in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.megatron.hardware import GPU
from vespo_megatron.plan.activations import element_size
from vespo_megatron.plan.memory import TrainerMemory, parameters
from vespo_megatron.recipe.schema import Recipe

_GIB = 2**30
PROCESS = int(1.5 * _GIB)
"""Assumed of a trainer's or a server's process on the card in every phase: CUDA's context and NCCL. Not measured."""
SERVING = 3 * _GIB
"""Assumed of a server beside `mem_fraction_static` while it generates: CUDA graphs and activations. Not measured."""
DEFAULT_FRACTION = 0.85
"""About what SGLang takes where `mem_fraction_static` is null."""


@dataclass(frozen=True)
class PhaseMemory:
    """Of one card, in bytes."""

    name: str
    trainer: int
    server: int

    @property
    def total(self) -> int:
        """Of both, with what their processes hold besides."""
        return self.trainer + self.server + 2 * PROCESS

    def fits(self, device: GPU) -> bool:
        """Whether the card has so much."""
        return self.total <= device.memory_gib * _GIB


def phases(shape: ModelShape, recipe: Recipe, device: GPU, memory: TrainerMemory) -> list[PhaseMemory]:
    """Each phase's peak, in the order of a run; empty where trainer and servers do not share devices."""
    generation = recipe.policy.generation
    if not generation.shares_devices:
        return []
    config = generation.sglang_cfg
    # Main weights are made with the optimizer, moments in its first step.
    built = memory.optimizer // 3 if recipe.policy.in_16_bits else 0
    served = parameters(shape).total * element_size(recipe) // config.tensor_parallel_size
    static = int((config.mem_fraction_static or DEFAULT_FRACTION) * device.memory_gib * _GIB)
    return [
        PhaseMemory("build", memory.weights + memory.gradients + built, 0),
        PhaseMemory("weights", memory.weights + 2 * config.weight_bucket_bytes, served),
        PhaseMemory("servers", 0, static + SERVING),
        PhaseMemory("train", memory.device, 0),
    ]


def parked_bytes(memory: TrainerMemory) -> int:
    """Host memory that a trainer process needs for what it gives back: parameters and optimizer state."""
    return memory.weights + memory.optimizer


def highest_fraction(device: GPU) -> float:
    """The largest `mem_fraction_static` with which servers and idle trainers fit, in hundredths."""
    room = device.memory_gib * _GIB - SERVING - 2 * PROCESS
    return int(100 * room / (device.memory_gib * _GIB)) / 100


def table(found: Sequence[PhaseMemory], recipe: Recipe, device: GPU, memory: TrainerMemory) -> list[str]:
    """The phases as lines of text, and whether they fit."""
    each, fraction = parked_bytes(memory), recipe.policy.generation.sglang_cfg.mem_fraction_static
    lines = [
        f"a card that trainer and server share, GiB of {device.memory_gib:g} by phase; assumed: {PROCESS / _GIB:g} of "
        f"each process at all times, {SERVING / _GIB:g} of graphs and activations of a server:",
        f"  {'':12}{'trainer':>8}{'server':>8}{'together':>10}",
    ]
    for phase in found:
        mark = "" if phase.fits(device) else "   too much"
        lines.append(
            f"  {phase.name:12}{phase.trainer / _GIB:8.2f}{phase.server / _GIB:8.2f}{phase.total / _GIB:10.2f}{mark}"
        )
    lines.append(
        f"  on the host, in the servers' turn, {each / _GIB:.2f} a process, "
        f"{recipe.cluster.gpus_per_node * each / _GIB:.0f} a node"
    )
    said = f"mem_fraction_static {fraction}" if fraction else f"SGLang's own share, about {DEFAULT_FRACTION}"
    verdict = "fits" if all(phase.fits(device) for phase in found) else "does not fit"
    lines.append(f"  with {said} it {verdict}; at most {highest_fraction(device)} leaves room for idle trainers")
    return lines
