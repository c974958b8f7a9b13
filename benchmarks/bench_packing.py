"""How full micro-batches are and how even the work of data parallel ranks is, on a long tail of lengths.

    python benchmarks/bench_packing.py [--record]

2,048 prompts of 512 tokens with responses log-normal up to 15,872, 8 data parallel ranks, 32,768 tokens a micro-batch,
one mini-batch; work is the FLOPs of Qwen3-30B-A3B. Against padded batches of four sequences in the order they came in
(what a trainer without packing runs), and against packing that balances tokens instead of FLOPs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from results import record

from vespo_megatron.data.layout import padded_length
from vespo_megatron.data.packing import plan_mini_batches
from vespo_megatron.megatron import flops
from vespo_megatron.plan.published import PUBLISHED

RANKS, BUDGET, PROMPT, LONGEST, RESPONSES = 8, 32768, 512, 15872, 2048
SHAPE = PUBLISHED["Qwen3-30B-A3B"]


def cost(length: int) -> int:
    return flops.sequence_cost(SHAPE, length)


def draw(seed: int) -> list[int]:
    """Median response 3,000 tokens, σ = 1 of the logarithm."""
    chance = random.Random(seed)
    return [PROMPT + min(LONGEST, int(chance.lognormvariate(8.0, 1.0)) + 1) for _ in range(RESPONSES)]


def padded_batches(lengths: list[int]) -> list[list[list[int]]]:
    """Four sequences each in the order they came in, dealt to the ranks in turn."""
    batches = [list(range(start, start + 4)) for start in range(0, len(lengths), 4)]
    return [batches[rank::RANKS] for rank in range(RANKS)]


def measure(ranks: list[list[list[int]]], lengths: list[int], *, padded: bool) -> dict[str, float]:
    """Shares in per cent."""

    def work(content: list[int]) -> float:
        longest = max(lengths[index] for index in content)
        return sum(cost(longest if padded else lengths[index]) for index in content)

    def tokens(content: list[int]) -> int:
        if padded:
            return len(content) * max(lengths[index] for index in content)
        return sum(padded_length(lengths[index], 2) for index in content)

    per_step = list(zip(*[[work(content) for content in rank] for rank in ranks], strict=True))
    per_rank = [sum(work(content) for content in rank) for rank in ranks]
    contents = [content for rank in ranks for content in rank]
    return {
        "micro-batches a rank": len(ranks[0]),
        "useful tokens": 100 * sum(lengths) / sum(map(tokens, contents)),
        "of the budget": 100 * sum(lengths) / (BUDGET * len(contents)),
        "imbalance": 100 * (max(per_rank) / statistics.fmean(per_rank) - 1),
        "lockstep": 100 * (sum(map(max, per_step)) / statistics.fmean(per_rank) - 1),
    }


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    seconds = []
    for seed in range(5):
        lengths = draw(seed)
        options = dict(
            num_mini_batches=1,
            data_parallel_size=RANKS,
            token_budget=BUDGET,
            padded_length=lambda length: padded_length(length, 2),
        )
        began = time.perf_counter()
        plan = plan_mini_batches(lengths, cost=cost, **options)
        seconds.append(time.perf_counter() - began)
        by_tokens = plan_mini_batches(lengths, **options)
        rows.setdefault("padded, four at a time", []).append(measure(padded_batches(lengths), lengths, padded=True))
        rows.setdefault("packed, tokens balanced", []).append(measure(by_tokens.mini_batches[0], lengths, padded=False))
        rows.setdefault("packed, FLOPs balanced", []).append(measure(plan.mini_batches[0], lengths, padded=False))
    lines = [
        f"{RESPONSES} sequences, {RANKS} data parallel ranks, {BUDGET} tokens a micro-batch, worst of five draws; "
        f"planned in {max(seconds):.2f} s at most. Useful: real over computed tokens. Budget: real tokens over the "
        "micro-batches' room. Imbalance: FLOPs of the busiest rank over the mean. In step: the same where ranks meet "
        "in every micro-batch (expert parallelism).",
        "",
        "| | micro-batches a rank | useful | of the budget | imbalance | in step |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        worst = {
            key: (min if key in ("useful tokens", "of the budget") else max)(f[key] for f in found) for key in found[0]
        }
        lines.append(
            f"| {name} | {worst['micro-batches a rank']:.0f} | {worst['useful tokens']:.1f}% "
            f"| {worst['of the budget']:.1f}% | {worst['imbalance']:.2f}% | {worst['lockstep']:.2f}% |"
        )
    lengths = draw(0)
    shared = RESPONSES * 7 / 8 * cost(PROMPT) / sum(map(cost, lengths))
    whole = sum(sum(lengths[start : start + 8]) > BUDGET for start in range(0, RESPONSES, 8)) / (RESPONSES / 8)
    lines += [
        "",
        f"Computing a prompt once for its eight responses would save {100 * shared:.1f}% of these FLOPs at most, if "
        f"every group were in one micro-batch; {100 * whole:.0f}% of the groups are longer than one.",
    ]
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        record("Packing and balance", text)


if __name__ == "__main__":
    main()
