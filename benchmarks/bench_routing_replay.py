"""What routing replay costs: an update with replay on and with replay off, in turns.

    python benchmarks/bench_routing_replay.py [--device cuda] [--record]

On a CPU of the tiny example (`make example`), with one thread; on a GPU of four layers of Qwen3-30B-A3B at their real
widths, with one pack of 16,384 tokens. Each round times one update with live routers, one replaying R2's tables, one
replaying R3's; the figures are medians over the rounds of the ratio inside a round, so a machine that slows down slows
all three. Log-probs under R2 are held to those of the pass that recorded it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import devices, slice_model  # noqa: E402
from benchmarks.results import record  # noqa: E402

LAYERS = 4
MOST_ERROR = 1e-3
"""Nats between log-probs of the same routes."""


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=devices.default_device())
    parser.add_argument("--model", default="examples/tiny_moe/build/model", help="on a CPU")
    parser.add_argument("--rounds", type=int, help="60 on a CPU, 10 on a GPU")
    parser.add_argument("--sequences", type=int, default=64, help="on a CPU")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (10 if arguments.device == "cuda" else 60)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        policy, batch, table_bytes, tokens, error = prepare(arguments, Path(folder))
        took = measure(policy, batch, arguments.rounds, arguments.device)
    text = report(took, table_bytes, tokens, error, policy, arguments)
    print(text)
    if arguments.record:
        where = "" if arguments.device == "cpu" else f" on {devices.name(arguments.device)}"
        record(f"Routing replay: cost of an update{where}", text)
    if not error < MOST_ERROR:
        sys.exit("the same routes give other log-probs")


def tiny_samples(number: int, vocabulary: int) -> list:
    """Prompts of 8 tokens, responses of 12 to 19."""
    from vespo_megatron.data.sample import Sample

    generator = np.random.default_rng(0)
    samples = []
    for index in range(number):
        response = int(generator.integers(12, 20))
        samples.append(
            Sample(
                sample_id=str(index),
                prompt_id=str(index),
                prompt_ids=generator.integers(0, vocabulary, 8),
                response_ids=generator.integers(0, vocabulary, response),
                behavior_log_probs=np.zeros(response),
                weight_versions=np.zeros(response),
                finish_reason="stop",
            )
        )
    return samples


def random_routes(tokens: int, layers: int, topk: int, experts: int, generator: np.random.Generator) -> np.ndarray:
    """uint8 [tokens, layers, topk]: evenly spread, an expert once a token."""
    first = generator.integers(0, experts, (tokens, layers, 1))
    step = experts // topk
    return ((first + np.arange(topk) * step) % experts).astype(np.uint8)


def prepare(arguments: argparse.Namespace, folder: Path):
    """A policy on one process and a micro-batch with routes of both kinds."""
    from dataclasses import replace

    from vespo_megatron.data.batch import Batch
    from vespo_megatron.megatron.micro_batch import layouts
    from vespo_megatron.megatron.micro_batch import prepare as slice_batches
    from vespo_megatron.megatron.policy import MegatronPolicy, RouteUse
    from vespo_megatron.routing_replay.table import slice_routes

    device = arguments.device
    on_gpu = device == "cuda"
    rank_info = slice_model.start(device, folder)
    if on_gpu:
        slice_model.write_config(LAYERS, device, folder / "model")
        samples = slice_model.make_samples(1, slice_model.pack_tokens(device), 151936)
        config = slice_model.make_recipe(device, folder / "model", len(samples), lr=1e-30, min_lr=0.0).policy
    else:
        config = slice_model.make_recipe(device, Path(arguments.model), 1, lr=1e-30, min_lr=0.0).policy
    policy = slice_model.make_policy(config, rank_info) if on_gpu else MegatronPolicy(config, rank_info)
    shape = policy.shape
    if not on_gpu:
        samples = tiny_samples(arguments.sequences, shape.vocab_size)
    topk, experts, generator = shape.num_experts_per_tok, shape.num_experts, np.random.default_rng(1)
    samples = [
        replace(
            sample,
            routes=random_routes(sample.num_tokens - 1, shape.num_moe_layers, topk, experts, generator),
            route_versions=0,
        )
        for sample in samples
    ]
    part = Batch(samples, np.ones(len(samples), np.float32))
    tables = [
        slice_routes(samples, where, policy.moe_layers, topk=topk, num_experts=experts)
        for where in layouts([part], rank_info)
    ]
    log_prob_bytes = (512 if on_gpu else 32) << 20
    batch = slice_batches([part], rank_info, temperature=1.0, log_prob_bytes=log_prob_bytes, routes=tables)
    batch[0].trainer_routes = policy.empty_routes(batch[0])
    (recorded,) = policy.log_probs(batch, routes=RouteUse("record", lambda each: (each.trainer_routes, None)))
    (replayed,) = policy.log_probs(batch, routes=RouteUse("replay", lambda each: (each.trainer_routes, None)))
    error = float((recorded[0] - replayed[0]).abs().max())
    return policy, batch, tables[0].nbytes, sum(sample.num_tokens for sample in samples), error


def measure(policy, batch, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each update, by mode; the first rounds warm up and are left out."""
    from vespo_megatron.megatron.policy import LIVE, RouteUse

    uses = {
        "off": LIVE,
        "R2": RouteUse("replay", lambda each: (each.trainer_routes, None)),
        "R3": RouteUse("replay", lambda each: (each.engine_routes, None)),
    }

    def loss(log_probs, entropies, micro_batch):
        return -log_probs.mean(), None

    warm = 2 if device == "cuda" else 5
    took: dict[str, list[float]] = {mode: [] for mode in uses}
    for number in range(rounds + warm):
        order = list(uses) if number % 2 else list(uses)[::-1]
        for mode in order:
            started = devices.now(device)
            policy.update(batch, loss, routes=uses[mode])
            if number >= warm:
                took[mode].append(devices.now(device) - started)
    return took


def report(took, table_bytes: int, tokens: int, error: float, policy, arguments) -> str:
    """Markdown with medians and ratios."""
    shape = policy.shape
    routes = tokens * shape.num_moe_layers * shape.num_experts_per_tok
    lines = [
        f"{tokens} tokens, {shape.num_moe_layers} MoE layers, {shape.num_experts} experts "
        f"top-{shape.num_experts_per_tok}, {arguments.rounds} rounds"
        f"{', one thread' if arguments.device == 'cpu' else ''}.",
        "",
        "| replay | median update | against off in the same round | a layer |",
        "|---|---|---|---|",
    ]
    for mode, values in took.items():
        pairs = list(zip(values, took["off"], strict=True))
        ratio = statistics.median(value / off for value, off in pairs)
        more = statistics.median(value - off for value, off in pairs) / shape.num_moe_layers
        middle = 1000 * statistics.median(values)
        lines.append(f"| {mode} | {middle:.1f} ms | {100 * (ratio - 1):+.1f}% | {1000 * more:+.2f} ms |")
    lines += [
        "",
        f"Routes held: {table_bytes} bytes for tokens × layers × topk = {routes} "
        f"({100 * (table_bytes / routes - 1):+.1f}%). Log-probs under R2 are off by {error:.1e} at most from those of "
        "the pass that recorded it.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
