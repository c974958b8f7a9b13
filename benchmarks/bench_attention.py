"""The native attention on a pack of tokens, forward and backward: one long sequence, and a pack with a long tail.

    python benchmarks/bench_attention.py [--device cuda] [--record]

Heads are those of Qwen3-30B-A3B. Rivals are PyTorch's SDPA sequence by sequence, without a pack, in each of its
backends, and the padded length classes that context parallelism and float32 use. FLOPs are those of the model (what
the backward computes again does not count), the floor their time at the rate of a square product, measured in the
same process. Rotary embedding of queries and keys comes last, against megatron-core's. Outputs and gradients are held
to float32's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import attention_candidate, devices  # noqa: E402
from benchmarks.results import record  # noqa: E402
from vespo_megatron.data.layout import SequenceLayout  # noqa: E402
from vespo_megatron.megatron import cpu_runtime  # noqa: E402

cpu_runtime.install()

from vespo_megatron.megatron.native.attention import (  # noqa: E402
    Pack,
    flash_attention,
    padded_attention,
    takes_packs,
)

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SIZES = {"cuda": (16384, 32, 4, 128), "cpu": (512, 8, 2, 32)}
"""Tokens, heads, heads of keys and values, numbers of a head."""
BACKENDS = {
    "SDPA, its own choice": None,
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
}
MOST_ERROR = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def long_tail(tokens: int) -> list[int]:
    """Log-normal lengths that fill the pack."""
    chance, lengths = np.random.default_rng(0), []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(int(np.clip(chance.lognormal(np.log(tokens / 12), 0.8), 16, tokens / 2)), left))
    return lengths


def inputs(tokens: int, heads: int, kv: int, dim: int, device: str) -> list[torch.Tensor]:
    """Query, key and value [tokens, heads, dim] as leaves, and the gradient of the answer."""
    torch.manual_seed(0)
    like = {"device": device, "dtype": devices.bits(device)}
    leaves = [torch.randn(tokens, number, dim, **like).requires_grad_() for number in (heads, kv, kv)]
    return [*leaves, torch.randn(tokens, heads, dim, **like)]


def by_sequence(lengths: list[int], backend: SDPBackend | None) -> Attend:
    """SDPA on each sequence alone."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        pieces = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
        done = []
        for piece in pieces:
            q, k, v = (tensor.transpose(0, 1)[None] for tensor in piece)
            done.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(done)

    def with_backend(*given: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return attend(*given)

    return attend if backend is None else with_backend


def pack_of(lengths: list[int], device: str) -> Pack:
    """Of sequences without padding."""
    return Pack(SequenceLayout(tuple(lengths), tuple(1 for _ in lengths)), torch.device(device))


def forms(lengths: list[int], device: str) -> dict[str, Attend]:
    """Those that can run there."""
    pack = pack_of(lengths, device)

    def padded(*given: torch.Tensor) -> torch.Tensor:
        return padded_attention(*given, pack, None)

    def ours(*given: torch.Tensor) -> torch.Tensor:
        return flash_attention(*given, pack, None) if takes_packs(given[0]) else padded(*given)

    found: dict[str, Attend] = {"ours": ours}
    if device == "cuda":
        runs = attention_candidate.runs_of(lengths, pack.offsets)
        found |= {
            "candidate": lambda *given: attention_candidate.pack_attention(*given, runs),
            "length classes": padded,
        }
    backends = BACKENDS if device == "cuda" else {"SDPA": None}
    return found | {name: by_sequence(lengths, backend) for name, backend in backends.items()}


def step(attend: Attend, given: list[torch.Tensor]) -> Callable[[], None]:
    """Forward and backward."""
    leaves, gradient = given[:3], given[3]

    def run() -> None:
        torch.autograd.grad(attend(*leaves), leaves, gradient)

    return run


def errors(form: str, lengths: list[int], size: tuple[int, ...], device: str) -> list[float]:
    """Of a form, on a small pack: output and gradients against float32 (float64 on a host)."""
    given = inputs(sum(lengths), *size[1:], device)
    accurate = torch.float32 if device == "cuda" else torch.float64
    exact = [tensor.detach().to(accurate).requires_grad_() for tensor in given[:3]]
    wanted = by_sequence(lengths, SDPBackend.MATH)(*exact)
    wanted_gradients = torch.autograd.grad(wanted, exact, given[3].to(accurate))
    found = forms(lengths, device)[form](*given[:3])
    gradients = torch.autograd.grad(found, given[:3], given[3])
    pairs = zip((found, *gradients), (wanted, *wanted_gradients), strict=True)
    return [float((ours.detach().to(accurate) - theirs).norm() / theirs.norm()) for ours, theirs in pairs]


def flops(lengths: list[int], heads: int, dim: int) -> int:
    """Forward and backward of causal attention: six products."""
    return 3 * sum(4 * heads * dim * (length * (length + 1) // 2) for length in lengths)


def table(title: str, lengths: list[int], given: list[torch.Tensor], device: str) -> list[str]:
    """One pack."""
    _, heads, _, dim = SIZES[device]
    work = flops(lengths, heads, dim)
    floor = devices.ceilings(device).floor(flops=work)
    lines = [
        "",
        f"{title}: {len(lengths)} sequences, longest {max(lengths)}; {work / 1e12:.3g} TFLOP, "
        f"floor {floor * 1e3:.2f} ms.",
        "",
        "| | ms | TFLOP/s | floor's share |",
        "|---|---|---|---|",
    ]
    for name, attend in forms(lengths, device).items():
        run = step(attend, given)
        try:
            took = devices.event_seconds(run, 10) if device == "cuda" else devices.median_seconds(device, run, 3, 1)
        except RuntimeError as error:
            lines.append(f"| {name} | - | - | cannot: {str(error).splitlines()[0][:80]} |")
            continue
        lines.append(f"| {name} | {took * 1e3:.2f} | {work / took / 1e12:.3g} | {floor / took:.0%} |")
    return lines


def first_times(size: tuple[int, ...]) -> str:
    """What the first call of a length costs the candidate, forward and backward: cuDNN plans each shape anew."""
    took = []
    for length in (9000, 10000, 11000, 12000):
        run = step(forms([length], "cuda")["candidate"], inputs(length, *size[1:], "cuda"))
        first = devices.median_seconds("cuda", run, 1, 0)
        took.append(first - devices.median_seconds("cuda", run, 3, 1))
    return (
        "A length's first call takes the candidate longer by "
        + ", ".join(f"{1e3 * each:.0f}" for each in took)
        + " ms."
    )


def rotary(given: list[torch.Tensor], device: str) -> list[str]:
    """Queries and keys, forward and backward: the kernel's time and megatron-core's, and how far they are apart."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from vespo_megatron.megatron.native.triton_rotary import rotate

    query, key = (tensor[:, None] for tensor in given[:2])
    angles = torch.rand(len(query), 1, 1, query.shape[-1] // 2, device=device) * 100
    cos, sin = angles[:, 0, 0].cos().contiguous(), angles[:, 0, 0].sin().contiguous()
    both = torch.cat([angles, angles], -1)

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return rotate(x[:, 0], cos, sin)[:, None]

    def upstream(x: torch.Tensor) -> torch.Tensor:
        return _apply_rotary_pos_emb_bshd(x, both)

    def run(turn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        return lambda: [torch.autograd.grad(turn(x), x, x.detach()) for x in (query, key)] and None

    exact = _apply_rotary_pos_emb_bshd(query.detach().float(), both)
    error = float((kernel(query.detach()).float() - exact).norm() / exact.norm())
    assert error < MOST_ERROR[query.dtype], error
    nbytes = 4 * (query.nbytes + key.nbytes)
    floor, took = devices.ceilings(device).floor(nbytes=nbytes), devices.event_seconds(run(kernel), 10)
    before = devices.event_seconds(run(upstream), 10)
    return [
        "",
        f"Rotary embedding of queries and keys: {took * 1e3:.2f} ms, floor {floor * 1e3:.2f} ms ({floor / took:.0%}); "
        f"megatron-core's {before * 1e3:.2f} ms. Off by {error:.1e}.",
    ]


def on_gpu(given: list[torch.Tensor], size: tuple[int, ...]) -> list[str]:
    """What only a GPU has."""
    wrong = max(errors("candidate", [5, 200, attention_candidate.LONG + 3, 77, 131], size, "cuda"))
    return ["", f"The candidate is off by {wrong:.1e} at most. {first_times(size)}", *rotary(given, "cuda")]


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=devices.default_device())
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    device, size = arguments.device, SIZES[arguments.device]
    wrong = max(errors("ours", [5, 200, 1, 77, 131], size, device))
    given = inputs(*size, device)
    lines = [
        f"{size[0]} tokens, {size[1]} heads, {size[2]} of keys and values, {size[3]} numbers each, "
        f"{str(given[0].dtype).removeprefix('torch.')}, forward + backward. {devices.ceilings(device)} "
        f"Largest error of ours on a small pack, output and gradients: {wrong:.1e}.",
        *table("One sequence", [size[0]], given, device),
        *table("A long tail", long_tail(size[0]), given, device),
        *(on_gpu(given, size) if device == "cuda" else []),
    ]
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        record(f"Attention on {devices.name(device)}", text)
    if not wrong < MOST_ERROR[devices.bits(device)]:
        sys.exit("ours is wrong")


if __name__ == "__main__":
    main()
