"""What routing replay costs: an update of the tiny example with replay on and with replay off, in turns.

    python benchmarks/bench_routing_replay.py            # prints
    python benchmarks/bench_routing_replay.py --record   # and writes benchmarks/RESULTS.md

One trainer process, one thread. Each round times one update with live routers, one replaying R2's tables, one replaying
R3's; the figures are medians over the rounds of the ratio inside a round, so a machine that slows down slows all three.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import numpy as np
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/tiny_moe/build/model")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(RANK="0", WORLD_SIZE="1")
    policy, batch, table_bytes, tokens = prepare(arguments)
    seconds = measure(policy, batch, arguments.rounds)
    text = report(seconds, table_bytes, tokens, policy, arguments)
    print(text)
    if arguments.record:
        from results import record

        record("Routing replay: cost of an update", text)


def prepare(arguments: argparse.Namespace):
    """A policy on one process and a micro-batch with routes of both kinds."""
    from vespo_megatron.data.batch import Batch
    from vespo_megatron.data.sample import Sample
    from vespo_megatron.megatron import parallel
    from vespo_megatron.megatron.micro_batch import layouts
    from vespo_megatron.megatron.micro_batch import prepare as slice_batches
    from vespo_megatron.megatron.policy import MegatronPolicy, RouteUse
    from vespo_megatron.recipe.schema import PolicyConfig
    from vespo_megatron.routing_replay.table import slice_routes

    config = PolicyConfig(model_name=arguments.model, precision="float32")
    config.megatron_cfg.optimizer.lr = 0.0
    store = "file://" + os.path.join(tempfile.mkdtemp(), "store")
    rank_info = parallel.initialize(config.megatron_cfg, seed=1, device=torch.device("cpu"), init_method=store)
    policy = MegatronPolicy(config, rank_info)
    shape, generator = policy.shape, np.random.default_rng(0)
    samples = []
    for index in range(arguments.sequences):
        response = int(generator.integers(12, 20))
        routes = generator.random((8 + response - 1, shape.num_moe_layers, shape.num_experts)).argsort(-1)
        samples.append(
            Sample(
                sample_id=str(index),
                prompt_id=str(index),
                prompt_ids=generator.integers(0, shape.vocab_size, 8),
                response_ids=generator.integers(0, shape.vocab_size, response),
                behavior_log_probs=np.zeros(response),
                weight_versions=np.zeros(response),
                finish_reason="stop",
                routes=routes[..., : shape.num_experts_per_tok].astype(np.uint8),
                routes_version=0,
            )
        )
    part = Batch(samples, np.ones(len(samples), np.float32))
    topk, experts = shape.num_experts_per_tok, shape.num_experts
    tables = [
        slice_routes(samples, where, policy.moe_layers, topk=topk, num_experts=experts)
        for where in layouts([part], rank_info)
    ]
    batch = slice_batches([part], rank_info, temperature=1.0, log_prob_bytes=32 << 20, routes=tables)
    batch[0].trainer_routes = policy.empty_routes(batch[0])
    policy.log_probs(batch, routes=RouteUse("record", lambda each: (each.trainer_routes, None)))
    return policy, batch, tables[0].nbytes, sum(sample.num_tokens for sample in samples)


def measure(policy, batch, rounds: int) -> dict[str, list[float]]:
    """Seconds of each update, by mode; the first rounds warm up and are left out."""
    from vespo_megatron.megatron.policy import LIVE, RouteUse

    uses = {
        "off": LIVE,
        "R2": RouteUse("replay", lambda each: (each.trainer_routes, None)),
        "R3": RouteUse("replay", lambda each: (each.engine_routes, None)),
    }

    def loss(log_probs, entropies, micro_batch):
        return -log_probs.mean(), None

    seconds: dict[str, list[float]] = {mode: [] for mode in uses}
    for number in range(rounds + 5):
        order = list(uses) if number % 2 else list(uses)[::-1]
        for mode in order:
            started = time.perf_counter()
            policy.update(batch, loss, routes=uses[mode])
            if number >= 5:
                seconds[mode].append(time.perf_counter() - started)
    return seconds


def report(seconds, table_bytes: int, tokens: int, policy, arguments) -> str:
    """Markdown with medians and ratios."""
    shape = policy.shape
    routes = tokens * shape.num_moe_layers * shape.num_experts_per_tok
    lines = [
        f"{arguments.sequences} sequences, {tokens} tokens, {shape.num_moe_layers} MoE layers, "
        f"{shape.num_experts} experts top-{shape.num_experts_per_tok}, {arguments.rounds} rounds, one thread.",
        "",
        "| replay | median update | against off in the same round |",
        "|---|---|---|",
    ]
    for mode, values in seconds.items():
        ratio = statistics.median(value / off for value, off in zip(values, seconds["off"], strict=True))
        lines.append(f"| {mode} | {1000 * statistics.median(values):.1f} ms | {100 * (ratio - 1):+.1f}% |")
    lines += [
        "",
        f"Routes held: {table_bytes} bytes for tokens × layers × topk = {routes} "
        f"({100 * (table_bytes / routes - 1):+.1f}%).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
