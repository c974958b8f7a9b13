"""The experts of a layer, forward and backward: grouped (`moe_grouped_gemm: true`) against a module per expert.

    python benchmarks/bench_experts.py [--record]

Both are what the native layer builds, on tokens sorted by expert as the dispatcher hands them over, with routes drawn
at random and gradients collected in `main_grad` as under megatron-core's DDP. Rounds alternate. The last columns are
what `torch.compile` could gain (it needs a C++ compiler on a CPU): the activation between the products, forward, as it
is written and compiled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import record  # noqa: E402

# experts, top-k, hidden, width, tokens, rounds
SIZES = {
    "tiny example": (8, 2, 64, 32, 1500, 60),
    "medium": (32, 4, 512, 256, 2048, 10),
    "30B's layer": (128, 8, 2048, 768, 2048, 3),
}


def build(kind: str, experts: int, topk: int, hidden: int, width: int):
    """The module, its parameters with a `main_grad` that autograd's gradient is added to and dropped."""
    import torch.nn.functional as F
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    from vespo_megatron.megatron.native.experts import GroupedExperts

    config = TransformerConfig(
        num_layers=1, hidden_size=hidden, num_attention_heads=2, ffn_hidden_size=width, moe_ffn_hidden_size=width,
        num_moe_experts=experts, moe_router_topk=topk, gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, bias_activation_fusion=False, gradient_accumulation_fusion=False,
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if kind == "grouped":
        module = GroupedExperts(experts, config, groups)
    else:
        linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        module = SequentialMLP(experts, config, linear, groups)

    def collect(parameter: torch.Tensor) -> None:
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    for parameter in module.parameters():
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros_like(parameter), False
        parameter.register_post_accumulate_grad_hook(collect)
    return module


def seconds(module, x, counts, probs, gradient) -> float:
    started = time.perf_counter()
    module(x.requires_grad_(), counts, probs.requires_grad_())[0].backward(gradient)
    x.grad = probs.grad = None
    return time.perf_counter() - started


def activation(gate_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """As `_GroupedSwiGLU.forward` has it."""
    gate, up = gate_up.chunk(2, dim=1)
    return torch.nn.functional.silu(gate).mul_(up).mul_(probs[:, None])


def activation_milliseconds(rows: int, width: int, rounds: int) -> dict[str, float]:
    """Medians of the activation as it is written, and compiled."""
    forms = {"written": activation, "compiled": torch.compile(activation, dynamic=False)}
    given = torch.randn(rows, 2 * width), torch.rand(rows)
    took: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 2):
        for name, form in forms.items():
            started = time.perf_counter()
            form(*given)
            if number >= 2:
                took[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in took.items()}


def row(name: str) -> str:
    """One line of the table."""
    experts, topk, hidden, width, tokens, rounds = SIZES[name]
    torch.manual_seed(0)
    counts = torch.rand(tokens, experts).topk(topk)[1].flatten().bincount(minlength=experts)
    given = (torch.randn(tokens * topk, hidden), counts, torch.rand(tokens * topk), torch.randn(tokens * topk, hidden))
    took: dict[str, list[float]] = {}
    modules = {kind: build(kind, experts, topk, hidden, width) for kind in ("loop", "grouped")}
    for number in range(rounds + 1):
        for kind, module in modules.items():
            took.setdefault(kind, []).append(seconds(module, *given))
            if number == 0:
                took[kind].clear()
    middle = {kind: statistics.median(values) for kind, values in took.items()}
    between = activation_milliseconds(tokens * topk, width, max(rounds, 10))
    return (
        f"| {name}: {experts} experts top-{topk}, hidden {hidden}, width {width} | {tokens} "
        f"| {middle['loop'] * 1e3:.1f} | {middle['grouped'] * 1e3:.1f} | {middle['loop'] / middle['grouped']:.2f} "
        f"| {between['written']:.2f} | {between['compiled']:.2f} |"
    )


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    from vespo_megatron.megatron import parallel
    from vespo_megatron.recipe.schema import MegatronConfig

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        parallel.initialize(MegatronConfig(), seed=1, device=torch.device("cpu"), init_method=store)
        lines = [
            f"float32, {torch.get_num_threads()} threads, forward + backward, median of alternating rounds.",
            "",
            "| layer | tokens | a module per expert (ms) | grouped (ms) | speed-up | activation (ms) | compiled (ms) |",
            "|---|---|---|---|---|---|---|",
            *(row(name) for name in arguments.size),
        ]
        parallel.finalize()
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        record("Experts on cpu", text)


if __name__ == "__main__":
    main()
