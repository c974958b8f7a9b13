"""Tokens/s of our client and pool against SGLang's own benchmark client, on the same server in the same run.

    python benchmarks/bench_rollout.py --record

Both ask for as many responses of the same lengths at the same concurrency, with log-probs and routes. The rival is
`python -m sglang.bench_serving` (random token ids, no streaming). They take turns, so that a machine that slows down
slows both; the ratio is of the medians. Afterwards 2,000 requests are in flight from one controller, several times,
and its memory is watched.

Needs the tiny example's model: `make example`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.rollout_sglang import connect, launch_servers
from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams
from vespo_megatron.rollout_sglang.server.environment import STUBS
from vespo_megatron.rollout_sglang.sglang_engine import SGLangEngine

RECIPE = "examples/tiny_moe/vespo.yaml"
IN_FLIGHT, ROUNDS = 2000, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--response", type=int, default=32, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    limit = "policy.generation.sglang_cfg.max_concurrent_requests"
    recipe = load_recipe(RECIPE, [f"{limit}={arguments.concurrency}"])
    with tempfile.TemporaryDirectory() as folder, launch_servers(recipe, folder) as servers:
        engine = connect(recipe, servers.urls)
        measure_ours(engine, arguments, group=1)  # both sides meet a warm server
        theirs, ours, grouped = [], [], []
        for repeat in range(arguments.repeats):
            theirs.append(measure_theirs(servers.urls[0], recipe.policy.model_name, arguments, Path(folder), repeat))
            ours.append(measure_ours(engine, arguments, group=1))
            grouped.append(measure_ours(engine, arguments, group=8))
            print(
                f"theirs {theirs[-1]:.0f}, ours {ours[-1]:.0f}, in groups of 8 {grouped[-1]:.0f} tokens/s", flush=True
            )
        engine.close()
        engine = connect(load_recipe(RECIPE, [f"{limit}={IN_FLIGHT}"]), servers.urls)
        text = throughput_table(theirs, ours, grouped, arguments) + "\n\n" + measure_memory(engine, arguments)
        engine.close()
    print(text)
    if arguments.record:
        from results import record

        record("Rollouts: our client and pool against SGLang's", text)


def requests(count: int, group: int, arguments: argparse.Namespace) -> list[GenerationRequest]:
    """Random prompts, `group` responses to each."""
    sampling = SamplingParams(max_new_tokens=arguments.response)
    prompts = [tuple(random.randrange(2, 40) for _ in range(arguments.prompt)) for _ in range(count // group)]
    return [GenerationRequest(f"r{i}", prompts[i // group], sampling, group_id=f"g{i // group}") for i in range(count)]


def measure_ours(engine: SGLangEngine, arguments: argparse.Namespace, group: int) -> float:
    """Response tokens per second through engine, pool and client, replies parsed and checked."""
    engine.clients[0].flush_cache()
    wanted = requests(arguments.requests, group, arguments)
    start = time.perf_counter()
    results = asyncio.run(engine.generate(wanted))
    seconds = time.perf_counter() - start
    tokens = sum(len(result.output_ids) for result in results)
    assert tokens == arguments.requests * arguments.response
    return tokens / seconds


def measure_theirs(url: str, model: str, arguments: argparse.Namespace, folder: Path, repeat: int) -> float:
    """The same by `sglang.bench_serving`."""
    output = folder / f"bench_{repeat}.jsonl"
    command = [
        sys.executable,
        "-m",
        "sglang.bench_serving",
        "--backend",
        "sglang",
        "--base-url",
        url,
        "--dataset-name",
        "random-ids",
        "--tokenize-prompt",
        "--model",
        model,
        "--tokenizer",
        model,
        "--num-prompts",
        arguments.requests,
        "--max-concurrency",
        arguments.concurrency,
        "--random-input-len",
        arguments.prompt,
        "--random-output-len",
        arguments.response,
        "--random-range-ratio",
        1.0,
        "--temperature",
        1.0,
        "--seed",
        repeat + 1,
        "--warmup-requests",
        1,
        "--disable-stream",
        "--disable-tqdm",
        "--return-logprob",
        "--return-routed-experts",
        "--flush-cache",
        "--output-file",
        output,
    ]
    path = os.pathsep.join(filter(None, [str(STUBS), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"SGLANG_USE_CPU_ENGINE": "0", "SGLANG_PLATFORM": "vespo_cpu", "PYTHONPATH": path}
    ran = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=300)
    if ran.returncode != 0 or not output.exists():
        raise SystemExit(f"sglang.bench_serving failed:\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}")
    report = json.loads(output.read_text().splitlines()[-1])
    assert report["completed"] == arguments.requests, report
    assert report["total_output_tokens"] == arguments.requests * arguments.response, report
    return report["output_throughput"]


def throughput_table(
    theirs: list[float], ours: list[float], grouped: list[float], arguments: argparse.Namespace
) -> str:
    """Medians and their ratios."""
    rival = statistics.median(theirs)
    rows = [("`sglang.bench_serving`", theirs), ("ours, one call per request", ours), ("ours, groups of 8", grouped)]
    lines = [
        f"{arguments.requests} requests of {arguments.prompt} prompt and {arguments.response} response tokens, "
        f"{arguments.concurrency} in flight, one server of the tiny example's model, log-probs and routes returned; "
        f"{arguments.repeats} turns each.",
        "",
        "| client | tokens/s, median (least to most) | of SGLang's |",
        "|---|---|---|",
    ]
    for name, rates in rows:
        middle = statistics.median(rates)
        lines.append(f"| {name} | {middle:.0f} ({min(rates):.0f} to {max(rates):.0f}) | {middle / rival:.0%} |")
    lines += ["", "Target: ≥ 95 %. A group of 8 shares its prompt's prefix, and one HTTP call."]
    return "\n".join(lines)


def measure_memory(engine: SGLangEngine, arguments: argparse.Namespace) -> str:
    """Resident memory of this process with `IN_FLIGHT` requests in flight, round after round."""
    process, peak, over = psutil.Process(), [0], threading.Event()
    engine.metrics()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before, after, peaks, most = process.memory_info().rss, [], [], 0.0
    for _ in range(ROUNDS):
        peak[0] = 0
        results = asyncio.run(engine.generate(requests(IN_FLIGHT, 1, arguments)))
        assert len({result.request_id for result in results}) == IN_FLIGHT
        held = sum(
            result.routes.nbytes + result.output_ids.nbytes + result.behavior_log_probs.nbytes for result in results
        )
        del results
        peaks.append(peak[0])
        after.append(process.memory_info().rss)
        metrics = engine.metrics()
        most = max(most, metrics.get("rollout/in_flight_max", 0.0))
    over.set()
    mebi = 2**20
    return (
        f"{most:.0f} requests in flight from one controller, {ROUNDS} rounds of {IN_FLIGHT}: peak resident memory "
        f"{', '.join(f'{(value - before) / mebi:.0f}' for value in peaks)} MiB above the start, "
        f"{', '.join(f'{(value - before) / mebi:.0f}' for value in after)} MiB after each round; the results of one "
        f"round are {held / mebi:.1f} MiB. Latency p50, p99 in the last round: "
        f"{metrics['rollout/latency_p50']:.1f}, {metrics['rollout/latency_p99']:.1f} s."
    )


if __name__ == "__main__":
    main()
