"""Ten thousand hostile answers through the math reward: how many a second, how many past the deadline, none lost.

    python benchmarks/bench_math_reward.py [--count 10000] [--workers 2] [--timeout 2] [--record]

The rival is the same function called without processes and deadlines, on the well-behaved answers alone.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import record
from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards import RewardPool, RewardRequest
from vespo_megatron.rewards.functions import math as math_reward


def hostile(random_: random.Random, number: int) -> tuple[str, str]:
    """(kind, text) of one response."""
    digits = random_.randint(1, 9)
    kinds = {
        "plain": rf"the answer is \boxed{{{digits}}}",
        "fraction": rf"\boxed{{\frac{{{digits}}}{{{digits + 1}}}}}",
        "tower of powers": rf"\boxed{{{'^{'.join(str(digits) for _ in range(random_.randint(3, 9)))}{'}' * 8}}}",
        "huge power": rf"\boxed{{{digits}^{{{10 ** random_.randint(5, 12)}}}}}",
        "deep nesting": r"\boxed{" * random_.randint(50, 3000) + str(digits),
        "deep fractions": r"\boxed{" + r"\frac{1}{" * random_.randint(20, 800) + "2" + "}" * random_.randint(0, 801),
        "broken LaTeX": "".join(random_.choice(r"\{}$^_&%#frac123+-=()[]") for _ in range(random_.randint(1, 400))),
        "huge factorial": rf"\boxed{{{10 ** random_.randint(3, 7)}!}}",
        "long sum": r"\boxed{" + "+".join(f"x^{{{i}}}" for i in range(random_.randint(50, 600))) + "}",
        "roots": r"\boxed{" + r"\sqrt{" * random_.randint(5, 200) + "x" + "}" * 201,
        "nulls": "\\boxed{\x00\ud7ff\u202e" + "٣" * random_.randint(1, 99) + "}",
        "matrix": r"\boxed{\begin{pmatrix}" + r"1&2\\" * random_.randint(1, 300) + r"\end{pmatrix}}",
    }
    if number % 500 == 0:
        return "a megabyte", "9" * 1_000_000
    kind = random_.choice(list(kinds))
    return kind, kinds[kind]


def main() -> None:
    """Score, count, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=2.0)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    random_ = random.Random(0)
    cases = [hostile(random_, number) for number in range(arguments.count)]
    pool = RewardPool(EnvConfig(reward="math", num_workers=arguments.workers, timeout=arguments.timeout))
    try:
        asyncio.run(pool.score([RewardRequest("warm", r"\boxed{1}", "1")] * arguments.workers))  # imports
        started = time.perf_counter()
        results = asyncio.run(pool.score([RewardRequest("s", text, "7") for _, text in cases]))
        took = time.perf_counter() - started
    finally:
        pool.close()
    late, failed = Counter(), Counter()
    for (kind, _), result in zip(cases, results, strict=True):
        late[kind] += result.unscored == "timeout"
        failed[kind] += result.unscored in ("error", "died")
    calm = [text for kind, text in cases if kind in ("plain", "fraction")]
    math_reward("s", calm[0], "7", {})  # imports
    started = time.perf_counter()
    for text in calm:
        math_reward("s", text, "7", {})
    alone = len(calm) / (time.perf_counter() - started)
    pool = RewardPool(EnvConfig(reward="math", num_workers=1, timeout=arguments.timeout))
    try:
        asyncio.run(pool.score([RewardRequest("warm", r"\boxed{1}", "1")]))
        started = time.perf_counter()
        asyncio.run(pool.score([RewardRequest("s", text, "7") for text in calm]))
        guarded = len(calm) / (time.perf_counter() - started)
    finally:
        pool.close()
    lines = [
        f"{len(results)} answers, {arguments.workers} workers, deadline {arguments.timeout:g} s: {took:.0f} s, "
        f"{len(results) / took:.0f} answers/s; {sum(late.values())} past the deadline, {sum(failed.values())} raised "
        f"or died, every one scored.",
        "",
        f"Well-behaved answers alone, one worker: {guarded:.0f}/s against {alone:.0f}/s without process and deadline "
        f"({guarded / alone:.2f}×).",
        "",
        "| kind | answers | past the deadline | raised or died |",
        "|---|---|---|---|",
    ]
    for kind, count in sorted(Counter(kind for kind, _ in cases).items()):
        lines.append(f"| {kind} | {count} | {late[kind]} | {failed[kind]} |")
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        record("Math reward under hostile answers", text)


if __name__ == "__main__":
    main()
