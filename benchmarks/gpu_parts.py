"""The parts of `gpu_day.py`: what each shows, its command, and how long it may take. In the order of their worth."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One command in a process of its own."""

    name: str
    what: str
    arguments: tuple[str, ...]
    """What follows `python`; `{device}` is cuda or cpu."""
    seconds: float = 60.0
    together: bool = False
    """Whether it may share the card with others of its kind: it measures no time."""
    on_gpu: tuple[str, ...] = ()
    """Arguments that only a run on a GPU gets."""
    on_cpu: tuple[str, ...] = ()
    """Those that make a run on a CPU small."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, device: str) -> list[str]:
        """Without the interpreter."""
        given = self.arguments + (self.on_gpu if device == "cuda" else self.on_cpu)
        return [argument.format(device=device) for argument in given]


def _figure(name: str, what: str, script: str, small: str = "", seconds: float = 60.0) -> Part:
    command = (f"benchmarks/{script}", "--device", "{device}")
    return Part(name, what, command, seconds, on_gpu=("--record",), on_cpu=tuple(shlex.split(small)))


def _tests(name: str, what: str, *arguments: str, seconds: float = 115.0) -> Part:
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", *arguments)
    return Part(name, what, command, seconds, together=True, on_gpu=("-m", "cuda or not cuda"))


def _cards(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/gpu/test_card_{name}.py" for name in names)


PARTS = (
    Part("versions", "imports, versions, and the card", ("benchmarks/gpu_versions.py",), 60),
    _tests("train", "whole runs by the command line", *_cards("train"), seconds=170),
    _tests("waits", "no micro-batch waits for the card; checkpoints", *_cards("waits", "checkpoints")),
    _tests("updates", "updates and gradients, float16 and its loss scale", *_cards("updates", "policy", "float16")),
    _tests("layouts", "several ranks on one card", *_cards("layouts")),
    _tests("parity", "against transformers, routes replayed, the engine", *_cards("parity", "replay", "engine")),
    _tests(
        "products",
        "attention, experts, quantised products",
        *_cards("attention", "experts", "dispatch", "quantization"),
    ),
    _tests("kernels", "log-probs, losses, weights on their way", *_cards("log_probs", "losses", "weights")),
    _tests("memory", "what a trainer process takes, against `plan`", *_cards("memory", "parked_memory")),
    _figure("slice", "a slice of Qwen3-30B-A3B: MFU", "bench_slice.py", "--layers 1 2 --steps 1", seconds=90),
    _figure("attention", "attention of packed sequences", "bench_attention.py"),
    _figure("experts", "one layer's experts", "bench_experts.py", "--size 'tiny example'"),
    _figure("replay", "what routing replay costs", "bench_routing_replay.py", "--rounds 2 --sequences 8", 90),
    _figure("rl_step", "an RL step of a small MoE", "bench_rl_step.py", "--layers 2 --steps 1", seconds=90),
    _figure("loss", "the loss against the copy", "bench_loss.py", "--sequences 4 --length 64 --repeats 1"),
    _figure(
        "logprobs",
        "log-probs from hidden states",
        "bench_logprobs.py",
        "--tokens 64 --hidden 32 --vocabulary 999 --dtypes float32 --repeats 1 --no-tp",
    ),
)
