"""Log-probs and entropies from hidden states, forward and backward: ours, plain log-softmaxes, TRL's, Liger's.

    pip install --no-deps "trl==1.16.*" accelerate datasets liger-kernel
    python benchmarks/bench_logprobs.py [--device cuda] [--record]

All give log-probs, all but Liger's entropies besides; the gradient comes through log-probs alone, as in training
without an entropy bonus. On a GPU ours comes a second time, with PyTorch's operations where it has kernels in Triton.
TRL's is the fused language-model head of its trainers, Liger's the function under its GRPO loss, each as its library
calls it; both are left out where they are not installed. The chunked form is the plain one, some rows at a time and
once more in the backward. "Extra" memory is the peak above the inputs and the gradients that any form must produce
(`hidden.grad`, `weight.grad`), on a host in a process of its own per form. TFLOP/s are those of the plain form's
three matrix products, whatever a form computes; the floor is their time at the rate of a square product, measured in
the same process. Every form runs once per round and the rounds alternate, so that what else the machine does touches
all alike; a form's time is its median on a GPU and its shortest on a host, where other work only ever makes it
longer. Errors are those of gradients against a float64 log-softmax, relative to its largest entry, at a vocabulary
that float64 can afford.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import devices  # noqa: E402
from benchmarks.results import record  # noqa: E402
from vespo_megatron.megatron import logit_tiles, logprobs  # noqa: E402

Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGE_ERROR_VOCABULARY = 19000
MOST_ERROR = {"float32": 1e-4, "bfloat16": 3e-2}
"""Of ours, else the script fails."""
CHUNK = 2048
"""Rows of the chunked form."""
MEMORY_MB = {"cpu": 64, "cuda": 512}
"""`logprob_memory_mb`: the default, and what the 30B's recipes have."""


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What everyone writes."""
    log_probs = (hidden @ weight.t()).float().log_softmax(-1)
    with torch.no_grad():
        (log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0]


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What one writes when that runs out of memory."""
    pieces = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([checkpoint(plain, rows, weight, wanted, use_reentrant=False) for rows, wanted in pieces])


def trl(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """TRL's fused head, as `add_fused_lm_head(outputs=("log_probs", "entropy"))` calls it."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
    )[0]


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The log-probs under Liger's fused linear GRPO loss; it has no entropy."""
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

    return _ChunkedSelectiveLogProbFunction.apply(hidden, weight, targets, None, 1.0, 4096)


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The output layer of the policy."""
    first = dist.get_rank() * weight.shape[0]
    budget = MEMORY_MB[hidden.device.type] << 20
    return logprobs.vocab_parallel_log_probs(
        hidden, weight, targets, first_id=first, group=dist.group.WORLD, memory_bytes=budget
    )[0]


def without_triton(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Ours as it is where there is no Triton."""
    with patch.object(logprobs, "operations", lambda device: logit_tiles):
        return ours(hidden, weight, targets)


FORMS: dict[str, Form] = {"plain": plain, "chunked": chunked, "TRL": trl, "Liger": liger, "ours": ours}
ON_A_GPU: dict[str, Form] = FORMS | {"ours, no Triton": without_triton}
PACKAGES = {"TRL": "trl", "Liger": "liger_kernel"}


def forms(device: str) -> dict[str, Form]:
    """Those that differ there and are installed."""
    every = ON_A_GPU if device == "cuda" else FORMS
    return {name: form for name, form in every.items() if name not in PACKAGES or find_spec(PACKAGES[name])}


def inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """hidden [rows, width], weight [vocabulary, width] as leaves, targets, and the gradient of the log-probs."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, width).to(device, dtype).requires_grad_()
    weight = torch.empty(vocabulary, width, dtype=dtype, device=device).normal_(0, width**-0.5).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (rows,)).to(device), (torch.randn(rows) / rows).to(device)


def step(form: Form, given: tuple[torch.Tensor, ...]) -> float:
    """Seconds of one forward and backward; gradients are left in the leaves."""
    hidden, weight, targets, gradient = given
    hidden.grad = weight.grad = None
    started = devices.now(hidden.device.type)
    form(hidden, weight, targets).backward(gradient)
    return devices.now(hidden.device.type) - started


def peak_extra_bytes(form: Form, given: tuple[torch.Tensor, ...]) -> int:
    """Peak memory of one step above inputs and gradients."""
    given[0].grad = given[1].grad = None
    peak = devices.PeakMemory(given[0].device.type)
    step(form, given)
    return peak.extra() - given[0].nbytes - given[1].nbytes


def join_world(rank: int, size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)


def memory_of(name: str, arguments: argparse.Namespace, dtype: str) -> int:
    """`peak_extra_bytes`, on a host in a process of its own."""
    if arguments.device == "cuda":
        shape = (arguments.tokens, arguments.hidden, arguments.vocabulary)
        given = inputs(*shape, DTYPES[dtype], "cuda")
        found = peak_extra_bytes(ON_A_GPU[name], given)
        del given
        gc.collect()
        devices.release("cuda")
        return found
    command = [sys.executable, __file__, "--memory-of", name, "--dtypes", dtype, "--tokens", str(arguments.tokens)]
    command += ["--hidden", str(arguments.hidden), "--vocabulary", str(arguments.vocabulary)]
    command += ["--device", arguments.device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def errors(dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Form → errors of the gradients of hidden and weight."""
    given = inputs(256, arguments.hidden, LARGE_ERROR_VOCABULARY, dtype, arguments.device)
    exact = [tensor.detach().double().requires_grad_() for tensor in given[:2]]
    log_probs = (exact[0] @ exact[1].t()).log_softmax(-1)
    log_probs.gather(-1, given[2][:, None])[:, 0].backward(given[3].double())
    found = {}
    for name, form in forms(arguments.device).items():
        step(form, given)
        found[name] = tuple(
            float((ours.grad.double() - theirs.grad).abs().max() / theirs.grad.abs().max())
            for ours, theirs in zip(given[:2], exact, strict=True)
        )
    return found


def _tensor_parallel_rank(rank: int, store: str, arguments: argparse.Namespace, queue) -> None:
    """Two ranks, each with half of the vocabulary and one thread: ours, and the plain form on a half of its own."""
    torch.set_num_threads(1)
    join_world(rank, 2, store)
    given = inputs(arguments.tokens, arguments.hidden, arguments.vocabulary // 2, torch.float32)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    half = (given[0], given[1], given[2] % (arguments.vocabulary // 2), given[3])
    for number in range(arguments.repeats + 1):
        for name, form, data in (("ours", ours, given), ("plain", plain, half)):
            dist.barrier()
            seconds = step(form, data)
            if number:
                times[name].append(seconds)
    extra = peak_extra_bytes(ours, given)
    queue.put((rank, {name: min(values) for name, values in times.items()}, extra))
    dist.barrier()


def tensor_parallel(arguments: argparse.Namespace) -> str:
    """One line about TP2."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        ranks = [
            context.Process(target=_tensor_parallel_rank, args=(rank, store, arguments, queue)) for rank in range(2)
        ]
        for process in ranks:
            process.start()
        answers = [queue.get(timeout=600) for _ in ranks]
        for process in ranks:
            process.join(60)
    slowest = {name: max(answer[1][name] for answer in answers) for name in ("ours", "plain")}
    extra = max(answer[2] for answer in answers) / 2**20
    return (
        f"TP2 (two processes, a thread and half of the vocabulary each, float32): {slowest['ours']:.2f} s, "
        f"{slowest['ours'] / slowest['plain']:.2f} of a plain log-softmax over that half without any communication; "
        f"{extra:.0f} MiB extra per rank."
    )


def rate(seconds: float, dtype: str, arguments: argparse.Namespace) -> str:
    """Of the three products that any form needs; and its share of what is possible, of the dtype measured."""
    flops = 6 * arguments.tokens * arguments.hidden * arguments.vocabulary
    share = "-"
    if DTYPES[dtype] is devices.bits(arguments.device):
        share = f"{devices.ceilings(arguments.device).floor(flops=flops) / seconds:.0%}"
    return f"{flops / seconds / 1e12:.2f} | {share}"


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=devices.default_device())
    parser.add_argument("--tokens", type=int, help="1,024 on a CPU, 16,384 on a GPU")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="both; on a GPU bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-tp", action="store_true")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    parser.add_argument("--memory-of", choices=ON_A_GPU, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or (16384 if arguments.device == "cuda" else 1024)
    arguments.dtypes = arguments.dtypes or (["bfloat16"] if arguments.device == "cuda" else list(DTYPES))
    with tempfile.TemporaryDirectory() as folder:
        join_world(0, 1, f"{folder}/store")
        shape = (arguments.tokens, arguments.hidden, arguments.vocabulary)
        if arguments.memory_of:
            form, last = ON_A_GPU[arguments.memory_of], (DTYPES[arguments.dtypes[0]], arguments.device)
            step(form, inputs(8, arguments.hidden, 4096, *last))
            print(peak_extra_bytes(form, inputs(*shape, *last)))
            return
        lines = [
            f"{arguments.tokens} tokens, hidden {arguments.hidden}, vocabulary {arguments.vocabulary}, "
            f"{torch.get_num_threads()} threads, {arguments.repeats} alternating rounds, forward + backward; "
            f"ours with {MEMORY_MB[arguments.device]} MiB for logits. {devices.ceilings(arguments.device)}",
            "",
            "| dtype | form | time (s) | TFLOP/s | floor's share | ours / it | extra memory (MiB) | ours / it "
            "| ∂hidden error | ∂weight error |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        right = True
        for dtype in arguments.dtypes:
            memory = {name: memory_of(name, arguments, dtype) for name in forms(arguments.device)}
            wrong = errors(DTYPES[dtype], arguments)
            right &= all(error < MOST_ERROR[dtype] for name in wrong if "ours" in name for error in wrong[name])
            given = inputs(*shape, DTYPES[dtype], arguments.device)
            times: dict[str, list[float]] = {name: [] for name in memory}
            for _ in range(arguments.repeats):
                for name, form in forms(arguments.device).items():
                    times[name].append(step(form, given))
            typical = statistics.median if arguments.device == "cuda" else min
            took = {name: typical(values) for name, values in times.items()}
            lines += [
                f"| {dtype} | {name} | {took[name]:.3g} | {rate(took[name], dtype, arguments)} "
                f"| {took['ours'] / took[name]:.2f} | {memory[name] / 2**20:.0f} "
                f"| {memory['ours'] / memory[name]:.3f} | {wrong[name][0]:.1e} | {wrong[name][1]:.1e} |"
                for name in memory
            ]
            del given
        dist.destroy_process_group()
    if arguments.device == "cpu" and not arguments.no_tp:
        lines += ["", tensor_parallel(arguments)]
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        record(f"Log-probs from hidden states on {devices.name(arguments.device)}", text)
    if not right:
        sys.exit("the gradients of ours are wrong")


if __name__ == "__main__":
    main()
