"""Forward and backward of the VESPO loss from per-token log-probs: ours, TRL's, and the plain padded formula.

    pip install --no-deps "trl==1.16.*" accelerate datasets   # --no-deps: torch stays what it is
    python benchmarks/bench_loss.py [--device cuda] [--record]

TRL's is its own `GRPOTrainer._compute_loss`, on a stand-in trainer whose model pass returns the log-probs; the time of
the two concatenations of token ids it does for that pass is measured apart and taken off. All sequences have the same
length here, so that padding costs the others nothing. "Extra memory" is the peak above the inputs, the gradient
included, on a host measured in a process of its own. Cases take turns, so each finds memory as a training step would:
what the last one freed has gone back to the system, and fresh pages cost whoever asks for them. One table grows the
responses at a fixed number of tokens. On a GPU sizes grow until launching no longer matters; what is in its kernels
alone, and what a CUDA graph of the same calls takes, is said beside the whole. TRL's case is left out where it is not
installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import devices, kernels  # noqa: E402
from benchmarks.results import record  # noqa: E402
from vespo_megatron.losses import LossInputs, Normalizer, PolicyLossConfig, compute_policy_loss  # noqa: E402
from vespo_megatron.losses.ratio_sums import ratio_sums  # noqa: E402
from vespo_megatron.losses.sequence import PackedSequences  # noqa: E402

Step = Callable[[], torch.Tensor]
CASES = ("ours", "ours with full metrics", "TRL", "padded formula")
BYTES_PER_TOKEN = 12
"""Read log π and log μ, write the gradient."""
GPU_SEQUENCES = (512, 4096, 16384, 65536)
"""Of 4,096 tokens: 2, 16, 64 and 256 million of them; beyond the first no cache holds them."""


def inputs(num_sequences: int, length: int, device: str) -> SimpleNamespace:
    """Log-probs of `num_sequences` responses of `length` tokens, made without temporaries."""
    generator = torch.Generator(device).manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device=device).uniform_(-2, -0.1, generator=generator)

    behavior = uniform(num_sequences * length)
    log_probs = behavior.clone().add_(0.01).requires_grad_()
    advantages = torch.randn(num_sequences, device=device, generator=generator)
    return SimpleNamespace(
        log_probs=log_probs, behavior_log_probs=behavior, advantages=advantages, n=num_sequences, length=length
    )


def ours(data: SimpleNamespace, metrics: str, *, pinned: bool = False) -> Step:
    """`compute_policy_loss` on packed tensors; `pinned` offsets can be copied in a CUDA graph."""
    config = PolicyLossConfig("vespo", metrics=metrics)
    normalizer = Normalizer(float(data.n * data.length), float(data.n))
    cu_seqlens = torch.arange(0, data.n * data.length + 1, data.length)
    cu_seqlens = cu_seqlens.pin_memory() if pinned else cu_seqlens

    def step() -> torch.Tensor:
        given = LossInputs(
            data.log_probs, data.behavior_log_probs, data.advantages, cu_seqlens, advantage_level="sequence"
        )
        return compute_policy_loss(given, config, normalizer).loss

    return step


def padded_formula(data: SimpleNamespace) -> Step:
    """The formula as one would write it on [sequences, length] with a mask."""
    mask = torch.ones(data.n, data.length, device=data.behavior_log_probs.device)
    behavior = data.behavior_log_probs.view(data.n, data.length)
    advantages = data.advantages[:, None]
    c1 = torch.where(advantages >= 0, 2.0, 3.0)
    c2 = torch.where(advantages >= 0, 3.0, 2.0)

    def step() -> torch.Tensor:
        log_probs = data.log_probs.view(data.n, data.length)
        log_ratio = (log_probs - behavior).detach().clamp(-20, 20)
        s = (log_ratio * mask).sum(1, keepdim=True).clamp(math.log(1e-8), 20)
        phi = (c2 + c1 * s - c2 * s.exp()).exp().nan_to_num(0, 0, 0)
        return (-phi * advantages * log_probs * mask).sum() / mask.sum()

    return step


def trl(data: SimpleNamespace) -> tuple[Step, Step]:
    """TRL's loss, and the concatenations to take off it."""
    from trl import GRPOConfig, GRPOTrainer

    device = data.behavior_log_probs.device
    shape = (data.n, data.length)
    log_probs, behavior = data.log_probs.view(shape), data.behavior_log_probs.view(shape)
    entropies = torch.zeros(1, 1, device=device).expand(shape)
    defaults = {f.name: f.default for f in GRPOConfig.__dataclass_fields__.values()}
    names = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "use_bias_correction_kl", "delta")
    trainer = SimpleNamespace(
        args=SimpleNamespace(**{name: defaults[name] for name in names}, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        loss_type="vespo",
        importance_sampling_level="token",
        beta=0.0,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, entropies, None),
    )
    given = {
        "prompt_ids": torch.zeros(data.n, 1, dtype=torch.long, device=device),
        "prompt_mask": torch.ones(data.n, 1, dtype=torch.long, device=device),
        "completion_ids": torch.zeros(shape, dtype=torch.long, device=device),
        "completion_mask": torch.ones(shape, dtype=torch.long, device=device),
        "advantages": data.advantages,
        "old_per_token_logps": behavior,
        "num_items_in_batch": torch.tensor(float(data.n * data.length), device=device),
    }

    def concatenations() -> torch.Tensor:
        ids = torch.cat([given["prompt_ids"], given["completion_ids"]], dim=1)
        return ids[0, 0] + torch.cat([given["prompt_mask"], given["completion_mask"]], dim=1)[0, 0]

    return lambda: GRPOTrainer._compute_loss(trainer, None, given), concatenations


def cases() -> list[str]:
    """Those that can run here."""
    return [case for case in CASES if case != "TRL" or find_spec("trl")]


def step_of(case: str, data: SimpleNamespace) -> Step:
    """The loss of a case."""
    if case == "TRL":
        return trl(data)[0]
    if case == "padded formula":
        return padded_formula(data)
    return ours(data, "full" if "metrics" in case else "none")


def seconds(runs: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Median time of a call of each, the calls taking turns; two rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 2):
        for name, run in runs.items():
            start = devices.now(device)
            run()
            if number >= 2:
                times[name].append(devices.now(device) - start)
    return {name: statistics.median(found) for name, found in times.items()}


def forward_backward(data: SimpleNamespace, step: Step) -> Callable[[], None]:
    """A training step's worth: loss, gradient, gradient thrown away."""

    def run() -> None:
        data.log_probs.grad = None
        step().backward()

    return run


def peak_extra_bytes(case: str, num_sequences: int, length: int, device: str) -> int:
    """Peak memory above the inputs of one forward and backward; call it in a fresh process."""
    small = inputs(2, 8, device)
    forward_backward(small, step_of(case, small))()
    data = inputs(num_sequences, length, device)
    run = forward_backward(data, step_of(case, data))
    peak = devices.PeakMemory(device)
    run()
    return peak.extra()


def measured_apart(case: str, arguments: argparse.Namespace) -> int:
    """`peak_extra_bytes`, on a host in a process of its own."""
    if arguments.device == "cuda":
        return peak_extra_bytes(case, arguments.sequences, arguments.length, arguments.device)
    command = [sys.executable, __file__, "--memory-of", case, "--device", arguments.device]
    command += ["--sequences", str(arguments.sequences), "--length", str(arguments.length)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def against_the_others(arguments: argparse.Namespace) -> list[str]:
    """The cases against each other, and longer responses, at `arguments.sequences`."""
    tokens, names = arguments.sequences * arguments.length, cases()
    data = inputs(arguments.sequences, arguments.length, arguments.device)
    runs = {case: forward_backward(data, step_of(case, data)) for case in names}
    timed = dict(runs)
    if "TRL" in names:
        timed["concatenations"] = trl(data)[1]
    time_of = seconds(timed, arguments.device, arguments.repeats)
    if "TRL" in names:
        time_of["TRL"] -= time_of.pop("concatenations")
    memory_of, gradient_of = {}, {}
    for case in names:
        runs[case]()
        gradient_of[case] = data.log_probs.grad.clone()
        memory_of[case] = measured_apart(case, arguments)
    for case in names:
        torch.testing.assert_close(gradient_of[case], gradient_of["padded formula"], rtol=1e-3, atol=1e-12)
    rival = "TRL" if "TRL" in names else "padded formula"
    whose = "TRL's" if rival == "TRL" else "the formula's (TRL is not installed)"
    lines = [
        f"{arguments.sequences} × {arguments.length} tokens, float32, {arguments.device}, "
        f"{torch.get_num_threads()} threads, median of {arguments.repeats} rounds, cases in turn; all gradients agree.",
        "",
        f"| loss | time (ms) | M tokens/s | throughput / {whose} | peak extra memory (MiB) | memory / {whose} |",
        "|---|---|---|---|---|---|",
    ]
    for case in names:
        took, memory = time_of[case], memory_of[case]
        lines.append(
            f"| {case} | {took * 1e3:.2f} | {tokens / took / 1e6:.0f} | {time_of[rival] / took:.2f} "
            f"| {memory / 2**20:.1f} | {memory / memory_of[rival]:.2f} |"
        )
    source, target = torch.empty_like(data.behavior_log_probs), torch.empty_like(data.behavior_log_probs)
    copy = seconds({"copy": lambda: target.copy_(source)}, arguments.device, arguments.repeats)["copy"]
    least = BYTES_PER_TOKEN * tokens
    lines += [
        "",
        f"Copy: {8 * tokens / copy / 1e9:.0f} GB/s. The loss must move {BYTES_PER_TOKEN} bytes per token (read log π "
        f"and log μ, write the gradient): ours {least / time_of['ours'] / 1e9:.1f} GB/s, "
        f"{least / time_of['ours'] / (8 * tokens / copy):.0%} of the copy.",
        "",
        "| response length | sequences | ours (ms) | sequence sums alone (ms) |",
        "|---|---|---|---|",
    ]
    for length in (256, 1024, 4096, 16384, 65536):
        if length > tokens:
            continue
        grown = inputs(tokens // length, length, arguments.device)
        cu_seqlens = torch.arange(0, grown.n * length + 1, length)
        packed = PackedSequences(cu_seqlens, grown.n * length, grown.behavior_log_probs.device)
        runs = {
            "loss": forward_backward(grown, ours(grown, "none")),
            "sums": lambda packed=packed, grown=grown: ratio_sums(
                packed, grown.log_probs.detach(), grown.behavior_log_probs, None, 20.0
            ),
        }
        took = seconds(runs, arguments.device, arguments.repeats)
        lines.append(f"| {length} | {grown.n} | {took['loss'] * 1e3:.2f} | {took['sums'] * 1e3:.2f} |")
    return lines


def larger_on_gpu(length: int) -> list[str]:
    """Ours at sizes that no cache holds, against the copy of as many bytes."""
    ceilings = devices.ceilings("cuda")
    empty = torch.zeros(1, device="cuda")
    lines = [
        "",
        f"{ceilings} One kernel that does nothing takes {devices.event_seconds(empty.zero_) * 1e6:.1f} µs after "
        f"another, {devices.median_seconds('cuda', empty.zero_) * 1e6:.1f} µs waited for.",
        "",
        "| M tokens | floor (µs) | waited for (µs) | one after another (µs) | kernels | busy (µs) | graph (µs) "
        "| copy's share: waited for | one after another | busy | graph |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for sequences in GPU_SEQUENCES:
        data = inputs(sequences, length, "cuda")
        run = forward_backward(data, ours(data, "none"))
        floor = ceilings.floor(nbytes=BYTES_PER_TOKEN * sequences * length)
        waited, queued = devices.median_seconds("cuda", run), devices.event_seconds(run)
        found, replayed = kernels.trace(run), graph_seconds(data)
        times = (waited, queued, found.busy, replayed)
        shown = [f"{time * 1e6:.0f}" for time in times]
        shown.insert(2, str(found.launches))
        lines.append(
            f"| {sequences * length / 1e6:.0f} | {floor * 1e6:.0f} | {' | '.join(shown)} "
            f"| {' | '.join(f'{floor / time:.0%}' for time in times)} |"
        )
        table = found.table(6)
        del data, run
        gc.collect()
        devices.release("cuda")
    return [*lines, "", "The kernels of the largest:", "", table]


def graph_seconds(data: SimpleNamespace) -> float:
    """Seconds of a replay of the same calls; NaN where they cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    run = forward_backward(data, ours(data, "none", pinned=True))
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f"no graph: {str(error).splitlines()[0]}")
        return math.nan
    return devices.event_seconds(graph.replay)


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=devices.default_device())
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's default")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    parser.add_argument("--memory-of", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(peak_extra_bytes(arguments.memory_of, arguments.sequences, arguments.length, arguments.device))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    lines = against_the_others(arguments)
    if arguments.device == "cuda":
        lines += larger_on_gpu(arguments.length)
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        record(f"VESPO loss on {devices.name(arguments.device)}", text)


if __name__ == "__main__":
    main()
