"""The experts of a layer, forward and backward: grouped (`moe_grouped_gemm: true`) against a module per expert.

    python benchmarks/bench_experts.py [--device cuda] [--record]

Both are what the native layer builds, on tokens sorted by expert as the dispatcher hands them over, with routes drawn
at random and gradients collected in `main_grad` as under megatron-core's DDP; float32 on a CPU, bfloat16 with float32
gradients on a GPU. Rounds alternate. The last columns are
what `torch.compile` could gain (it needs a C++ compiler on a CPU): the activation between the products, forward, as it
is written and compiled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import devices  # noqa: E402
from benchmarks.results import record  # noqa: E402

# experts, top-k, hidden, width, tokens, rounds
SIZES = {
    "tiny example": (8, 2, 64, 32, 1500, 60),
    "medium": (32, 4, 512, 256, 2048, 10),
    "30B's layer": (128, 8, 2048, 768, 2048, 3),
    "30B's layer, GPU": (128, 8, 2048, 768, 8192, 20),
}


def build(kind: str, dtype: torch.dtype, experts: int, topk: int, hidden: int, width: int):
    """The module, its parameters with a `main_grad` that autograd's gradient is added to and dropped."""
    import torch.nn.functional as F
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    from vespo_megatron.megatron.native.experts import GroupedExperts

    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=2,
        ffn_hidden_size=width,
        moe_ffn_hidden_size=width,
        num_moe_experts=experts,
        moe_router_topk=topk,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        params_dtype=dtype,
    )
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
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
        parameter.register_post_accumulate_grad_hook(collect)
    return module


def seconds(module, x, counts, probs, gradient) -> float:
    started = devices.now(x.device.type)
    module(x.requires_grad_(), counts, probs.requires_grad_())[0].backward(gradient)
    x.grad = probs.grad = None
    return devices.now(x.device.type) - started


def activation(gate_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """As `_GroupedSwiGLU.forward` has it."""
    gate, up = gate_up.chunk(2, dim=1)
    return torch.nn.functional.silu(gate).mul_(up).mul_(probs[:, None])


def activation_milliseconds(rows: int, width: int, rounds: int, like: dict) -> dict[str, float]:
    """Medians of the activation as it is written, and compiled."""
    forms = {"written": activation, "compiled": torch.compile(activation, dynamic=False)}
    given = torch.randn(rows, 2 * width, **like), torch.rand(rows, **like)
    took: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 2):
        for name, form in forms.items():
            started = devices.now(like["device"])
            form(*given)
            if number >= 2:
                took[name].append((devices.now(like["device"]) - started) * 1e3)
    return {name: statistics.median(values) for name, values in took.items()}


def row(name: str, device: str) -> str:
    """One line of the table."""
    like = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    experts, topk, hidden, width, tokens, rounds = SIZES[name]
    torch.manual_seed(0)
    counts = torch.rand(tokens, experts).topk(topk)[1].flatten().bincount(minlength=experts)
    rows = tokens * topk
    x, probs, gradient = torch.randn(rows, hidden, **like), torch.rand(rows, device=device), torch.randn(rows, hidden)
    given = (x, counts, probs, gradient.to(**like))
    took: dict[str, list[float]] = {}
    modules = {kind: build(kind, like["dtype"], experts, topk, hidden, width) for kind in ("loop", "grouped")}
    for number in range(rounds + 1):
        for kind, module in modules.items():
            took.setdefault(kind, []).append(seconds(module, *given))
            if number == 0:
                took[kind].clear()
    middle = {kind: statistics.median(values) for kind, values in took.items()}
    between = activation_milliseconds(rows, width, max(rounds, 10), like)
    return (
        f"| {name}: {experts} experts top-{topk}, hidden {hidden}, width {width} | {tokens} "
        f"| {middle['loop'] * 1e3:.1f} | {middle['grouped'] * 1e3:.1f} | {middle['loop'] / middle['grouped']:.2f} "
        f"| {between['written']:.2f} | {between['compiled']:.2f} |"
    )


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=devices.default_device())
    parser.add_argument("--size", nargs="+", choices=SIZES)
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    sizes = arguments.size or [size for size in SIZES if arguments.device == "cuda" or not size.endswith("GPU")]
    from vespo_megatron.megatron import parallel
    from vespo_megatron.recipe.schema import MegatronConfig

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        parallel.initialize(MegatronConfig(), seed=1, device=torch.device(arguments.device), init_method=store)
        lines = [
            f"{'bfloat16' if arguments.device == 'cuda' else 'float32'}, {torch.get_num_threads()} threads, "
            "forward + backward, median of alternating rounds.",
            "",
            "| layer | tokens | a module per expert (ms) | grouped (ms) | speed-up | activation (ms) | compiled (ms) |",
            "|---|---|---|---|---|---|---|",
            *(row(name, arguments.device) for name in sizes),
        ]
        parallel.finalize()
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        record(f"Experts on {devices.name(arguments.device)}", text)


if __name__ == "__main__":
    main()
