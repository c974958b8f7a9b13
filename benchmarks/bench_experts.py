"""The experts of a layer, forward and backward: grouped (`moe_grouped_gemm: true`) against a module per expert.

    python benchmarks/bench_experts.py [--device cuda] [--record]

Both are what the native layer builds, on tokens sorted by expert as the dispatcher hands them over, with routes drawn
at random and gradients collected in `main_grad` as under megatron-core's DDP; float32 on a CPU, bfloat16 with float32
gradients on a GPU. Rounds alternate. On a CPU the last columns are what `torch.compile` could gain (it needs a C++
compiler): the activation between the products, forward, as it is written and compiled.

On a GPU the floor is that of the layer's products at the rate of a square one, measured in the same process; "one
expert" is the same products with one weight for all rows. A second table has the parts, and what they are instead of.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

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
    "30B's layer, GPU": (128, 8, 2048, 768, 16384, 10),
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


def gpu_report(name: str) -> list[str]:
    """Both tables of a layer, and a check of the gradients."""
    experts, topk, hidden, width, tokens, rounds = SIZES[name]
    torch.manual_seed(0)
    like = {"device": "cuda", "dtype": torch.bfloat16}
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool, device="cuda")
    routing_map.scatter_(1, torch.rand(tokens, experts, device="cuda").topk(topk)[1], True)
    counts, rows = routing_map.sum(0), tokens * topk
    x, gradient, probs = torch.randn(rows, hidden, **like), torch.randn(rows, hidden, **like), torch.rand(rows).cuda()
    flops = 3 * 2 * rows * 3 * hidden * width
    ceilings = devices.ceilings("cuda")
    floor = ceilings.floor(flops=flops)
    modules = {kind: build(kind, torch.bfloat16, experts, topk, hidden, width) for kind in ("loop", "grouped")}
    check(modules["grouped"], x, counts, probs, gradient, width)
    given = {"loop": (x, counts.cpu(), probs, gradient), "grouped": (x, counts, probs, gradient)}
    took: dict[str, list[float]] = {kind: [] for kind in modules}
    for number in range(rounds + 2):
        for kind, module in modules.items():
            spent = seconds(module, *given[kind])
            if number >= 2:
                took[kind].append(spent)
    middle = {kind: statistics.median(values) for kind, values in took.items()}
    middle["one expert"] = devices.event_seconds(one_expert(x.detach(), gradient, width), rounds)
    lines = [
        f"{name}: {experts} experts top-{topk}, hidden {hidden}, width {width}, {tokens} tokens, bfloat16, forward + "
        f"backward, median of {rounds} alternating rounds. {ceilings} {flops / 1e12:.2f} TFLOP: floor "
        f"{floor * 1e3:.2f} ms.",
        "",
        "| | ms | TFLOP/s | floor's share |",
        "|---|---|---|---|",
    ]
    for kind, spent in middle.items():
        lines.append(f"| {kind} | {spent * 1e3:.2f} | {flops / spent / 1e12:.0f} | {floor / spent:.0%} |")
    return [*lines, "", *parts(modules["grouped"], x.detach(), gradient, probs.detach(), routing_map, topk)]


def check(module, x, counts, probs, gradient, width: int) -> None:
    """The first expert's rows in float64. Raises AssertionError."""
    for parameter in module.parameters():
        parameter.main_grad.zero_()
    output = module(x.requires_grad_(), counts, probs.requires_grad_())[0]
    output.backward(gradient)
    here = slice(0, int(counts[0]))
    fc1, fc2 = (weight[0].detach().double().requires_grad_() for weight in module.parameters())
    rows = x[here].detach().double().requires_grad_()
    gates = probs[here].detach().double().requires_grad_()
    gate, up = (rows @ fc1.t()).split(width, dim=1)
    exact = (torch.nn.functional.silu(gate) * up * gates[:, None]) @ fc2.t()
    exact.backward(gradient[here].double())
    found = (output[here], x.grad[here], probs.grad[here], *(weight.main_grad[0] for weight in module.parameters()))
    for ours, theirs in zip(found, (exact, rows.grad, gates.grad, fc1.grad, fc2.grad), strict=True):
        error = float((ours.double() - theirs).norm() / theirs.norm())
        assert error < 1e-2, error
    x.grad = probs.grad = None


def one_expert(x: torch.Tensor, gradient: torch.Tensor, width: int) -> Callable[[], None]:
    """The six products of a layer whose tokens all go to one expert."""
    hidden = x.shape[1]
    fc1, fc2 = (torch.randn(*shape, device="cuda", dtype=x.dtype) for shape in ((2 * width, hidden), (hidden, width)))
    wide, narrow = (torch.randn(len(x), size, device="cuda", dtype=x.dtype) for size in (2 * width, width))

    def run() -> None:
        x @ fc1.t(), narrow @ fc2.t()
        gradient @ fc2, gradient.t() @ narrow
        wide @ fc1, wide.t() @ x

    return run


def parts(module, x, gradient, probs, routing_map, topk: int) -> list[str]:
    """Each part of the layer alone, with its floor, and upstream's or PyTorch's way where it is another one."""
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    from vespo_megatron.megatron.native import experts
    from vespo_megatron.megatron.native.dispatch import Places, sum_rows

    fc1, fc2 = (weight.detach() for weight in module.parameters())
    main1, main2 = (weight.main_grad for weight in module.parameters())
    groups = experts._Groups(routing_map.sum(0), x, fc2)
    gate_up, narrow = groups.product(x, fc1.transpose(1, 2)), groups.product(gradient, fc2)
    places = Places.of(routing_map, topk)
    tokens = torch.randn(len(routing_map), x.shape[1], device="cuda", dtype=x.dtype)
    order = places.tokens
    dense = torch.rand(routing_map.shape, device="cuda")
    by_pytorch = mock.patch.object(experts, "has_kernels", lambda rows: False)

    def activation(backward: bool) -> None:
        # `slope` is written over by PyTorch's way: what is in it does not matter for the time
        experts.swiglu_gradient(gate_up, probs, narrow) if backward else experts.swiglu(gate_up, probs)

    def instead(backward: bool) -> None:
        with by_pytorch:
            activation(backward)

    wide, slim, size = x.nbytes, narrow.nbytes, 2 * x.shape[0]
    flops1, flops2 = size * fc1[0].numel(), size * fc2[0].numel()
    every = {
        "fc1": (lambda: groups.product(x, fc1.transpose(1, 2)), None, 0, flops1),
        "fc2": (lambda: groups.product(narrow, fc2.transpose(1, 2)), None, 0, flops2),
        "gradient through fc2": (lambda: groups.product(gradient, fc2), None, 0, flops2),
        "gradient through fc1": (lambda: groups.product(gate_up, fc1), None, 0, flops1),
        "fc1's gradient into float32": (
            lambda: groups.add_outer(main1, gate_up, x),
            lambda: main1.add_(torch._grouped_mm(gate_up.t(), x, offs=groups.ends)),
            2 * main1.nbytes,
            flops1,
        ),
        "fc2's gradient into float32": (
            lambda: groups.add_outer(main2, gradient, narrow),
            lambda: main2.add_(torch._grouped_mm(gradient.t(), narrow, offs=groups.ends)),
            2 * main2.nbytes,
            flops2,
        ),
        "SwiGLU": (lambda: activation(False), lambda: instead(False), 3 * slim, 0),
        "SwiGLU's gradient": (lambda: activation(True), lambda: instead(True), 6 * slim, 0),
        "places of the rows": (lambda: Places.of(routing_map, topk), None, 0, 0),
        "sort": (
            lambda: tokens.index_select(0, places.tokens),
            lambda: permute(tokens, routing_map, dense),
            tokens.nbytes + wide,
            0,
        ),
        "sum up": (
            lambda: sum_rows(gradient, places.positions),
            lambda: unpermute(gradient, order, tokens.shape),
            tokens.nbytes + wide,
            0,
        ),
    }
    ceilings = devices.ceilings("cuda")
    lines = ["| part | ms | floor (ms) | floor's share | instead of (ms) |", "|---|---|---|---|---|"]
    for name, (run, other, nbytes, flops) in every.items():
        took, floor = devices.event_seconds(run, 10), ceilings.floor(nbytes=nbytes, flops=flops)
        before = f"{devices.event_seconds(other, 10) * 1e3:.2f}" if other else "-"
        share = f"{floor * 1e3:.2f} | {floor / took:.0%}" if floor else "- | -"
        lines.append(f"| {name} | {took * 1e3:.2f} | {share} | {before} |")
    return lines


def cpu_report(sizes: list[str]) -> list[str]:
    """The table of layers."""
    return [
        f"float32, {torch.get_num_threads()} threads, forward + backward, median of alternating rounds.",
        "",
        "| layer | tokens | a module per expert (ms) | grouped (ms) | speed-up | activation (ms) | compiled (ms) |",
        "|---|---|---|---|---|---|---|",
        *(row(name, "cpu") for name in sizes),
    ]


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=devices.default_device())
    parser.add_argument("--size", nargs="+", choices=SIZES)
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    sizes = arguments.size or [size for size in SIZES if (arguments.device == "cuda") == size.endswith("GPU")]
    from vespo_megatron.megatron import parallel
    from vespo_megatron.recipe.schema import MegatronConfig

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        parallel.initialize(MegatronConfig(), seed=1, device=torch.device(arguments.device), init_method=store)
        lines = (
            cpu_report(sizes) if arguments.device == "cpu" else [part for name in sizes for part in gpu_report(name)]
        )
        parallel.finalize()
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        record(f"Experts on {devices.name(arguments.device)}", text)


if __name__ == "__main__":
    main()
