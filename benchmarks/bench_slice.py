"""MFU of some layers of Qwen3-30B-A3B at their real widths on one GPU, with the native layers: an update of VESPO.

    python benchmarks/bench_slice.py [--layers 2 4] [--record]

Embedding, output layer and vocabulary are the model's own, the weights random, the micro-batches packed to 16,384
tokens of sequences with a long tail, the step the trainer's own: packing, slicing, forward, backward, optimizer,
metrics. Model FLOPs are counted as in `throughput/mfu`; the floor is their time at the rate of a square product,
measured in the same process. Two numbers of layers give the time of one more layer and the rest, and from these the
update of all 48 layers, as if they fit. On a CPU the widths are a sixteenth, so that the script itself can be tried;
what it says there is no MFU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import devices, kernels, slice_model  # noqa: E402
from benchmarks.results import record  # noqa: E402

OPTIMIZER_BYTES = 38
"""A parameter's: norm reads 4 of gradient; Adam reads 16 and writes 12; the copy reads 4 and writes 2."""


@dataclass(frozen=True)
class Measured:
    """Of one number of layers; seconds."""

    layers: int
    parameters: int
    num_tokens: int
    update: float
    optimizer: float
    flops: int
    flops_of_all_layers: int
    memory: int
    trace: kernels.Trace | None
    finite: bool
    """The last gradients."""


def measure(layers: int, steps: int, device: str, folder: Path, rank_info, *, traced: bool) -> Measured:
    """Updates with `layers` layers."""
    from benchmarks.training_step import train_step
    from vespo_megatron.megatron import flops
    from vespo_megatron.trainer.objective import Objective

    tokens = slice_model.pack_tokens(device)
    model = folder / f"layers_{layers}"
    slice_model.write_config(layers, device, model)
    batch = slice_model.make_batch(8, tokens, 151936 // slice_model.share(device))
    recipe = slice_model.make_recipe(device, model, len(batch.samples))
    began = time.perf_counter()
    peak = devices.PeakMemory(device)
    policy, objective = slice_model.make_policy(recipe.policy, rank_info), Objective(recipe.loss_fn, "rollout")
    print(f"{layers} layers: built in {devices.now(device) - began:.1f} s", flush=True)

    def update() -> None:
        train_step(batch, recipe, policy, objective)

    took = []
    for number in range(steps + 2):
        started = devices.now(device)
        update()
        took.append(devices.now(device) - started)
        print(f"update {number}: {took[-1]:.3f} s", flush=True)
    trace = None
    if traced and device == "cuda":
        trace = kernels.trace(update)
    optimizer = devices.median_seconds(device, policy.optimizer.step, 3, 1)
    lengths = [sample.num_tokens for sample in batch.samples]
    responses = sum(len(sample.response_ids) for sample in batch.samples)
    found = Measured(
        layers,
        sum(parameter.numel() for chunk in policy.chunks for parameter in chunk.parameters()),
        sum(lengths),
        statistics.median(took[2:]),
        optimizer,
        flops.training(policy.shape, lengths, responses),
        flops.training(slice_model.whole_model(policy.shape), lengths, responses),
        peak.extra(),
        trace,
        policy.gradients_finite(),
    )
    slice_model.free(policy)
    return found


def line(name: str, flops: float, seconds: float, num_tokens: int, peak: float | None, device: str) -> str:
    """The end of a row: rate, MFU, and the share of what is possible."""
    mfu = f"{flops / seconds / peak / 1e12:.1%}" if peak else "-"
    floor = devices.ceilings(device).floor(flops=flops)
    return (
        f"| {name} | {seconds:.3g} | {num_tokens / seconds:,.0f} | {flops / 1e12:.3g} | {flops / seconds / 1e12:.3g} "
        f"| {mfu} | {floor:.3g} | {floor / seconds:.0%} |"
    )


def report(all_measured: list[Measured], device: str) -> list[str]:
    """The tables."""
    from vespo_megatron.megatron.hardware import peak_tflops

    peak = peak_tflops(devices.name(device))
    ceilings = devices.ceilings(device)
    lines = [
        f"Micro-batches packed to {slice_model.pack_tokens(device)} tokens, {all_measured[0].num_tokens} tokens an "
        f"update, {str(devices.bits(device)).removeprefix('torch.')}, one device, median. {ceilings}"
        + (f" MFU is of {peak:.0f} TFLOP/s, the data sheet's." if peak else ""),
        "",
        "| layers | seconds | tokens/s | model TFLOP | TFLOP/s | MFU | floor (s) | floor's share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in all_measured:
        lines.append(line(str(each.layers), each.flops, each.update, each.num_tokens, peak, device))
    few, many = all_measured[0], all_measured[-1]
    if many.layers > few.layers:
        layer = (many.update - few.update) / (many.layers - few.layers)
        work = (many.flops - few.flops) / (many.layers - few.layers)
        rest, rest_work = few.update - few.layers * layer, few.flops - few.layers * work
        whole = rest + slice_model.MODEL_LAYERS * layer
        lines += [
            line("one more layer", work, layer, few.num_tokens, peak, device),
            line("the rest", rest_work, rest, few.num_tokens, peak, device),
            line(
                f"{slice_model.MODEL_LAYERS}, extrapolated",
                few.flops_of_all_layers,
                whole,
                few.num_tokens,
                peak,
                device,
            ),
        ]
    lines += ["", "| layers | parameters (billion) | optimizer (s) | its floor (s) | most memory (GiB) |"]
    lines += ["|---|---|---|---|---|"]
    for each in all_measured:
        floor = ceilings.floor(nbytes=OPTIMIZER_BYTES * each.parameters)
        lines.append(
            f"| {each.layers} | {each.parameters / 1e9:.2f} | {each.optimizer:.3f} | {floor:.3f} "
            f"| {each.memory / 2**30:.1f} |"
        )
    if many.trace is not None:
        lines += ["", f"An update of {many.layers} layers under the profiler:", "", many.trace.table()]
    return lines


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md (a GPU's figures alone)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=devices.default_device())
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    if arguments.record and arguments.device != "cuda":
        parser.error("--record: only a GPU's figures are worth keeping")
    from vespo_megatron.megatron import parallel

    devices.ceilings(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        rank_info = slice_model.start(arguments.device, Path(folder))
        found = []
        for layers in sorted(arguments.layers):
            traced = layers == max(arguments.layers)
            found.append(measure(layers, arguments.steps, arguments.device, Path(folder), rank_info, traced=traced))
            gc.collect()
            devices.release(arguments.device)
        parallel.finalize()
    text = "\n".join(report(found, arguments.device))
    print(text)
    if arguments.record:
        record(f"A slice of Qwen3-30B-A3B on {devices.name(arguments.device)}", text)
    if not all(each.finite for each in found):
        sys.exit("gradients are not finite")


if __name__ == "__main__":
    main()
