"""What over-sampling saves where lengths have a heavy tail, and how it biases the lengths that are trained on.

    python benchmarks/bench_oversampling.py [--steps 40] [--record]

The real client, pool and controller against a server of the tests that draws nothing: lengths are lognormal, of median
55 tokens and σ 1, each token takes a millisecond, and all responses run at once. A step is over when its last response
is. Every setting trains on as many whole groups.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "rollout_sglang"), str(ROOT / "tests/controller")]

from listed_prompts import ListedPrompts  # noqa: E402
from model_config import CONFIG  # noqa: E402
from tail_server import TailServer  # noqa: E402
from test_controller import Logger, Rewards, Tokenizer  # noqa: E402

from benchmarks.results import record  # noqa: E402
from vespo_megatron.controller.controller import Controller  # noqa: E402
from vespo_megatron.data.prompt_set import PromptRecord  # noqa: E402
from vespo_megatron.data.prompt_stream import PromptStream  # noqa: E402
from vespo_megatron.recipe.schema import Recipe  # noqa: E402
from vespo_megatron.rollout_sglang import connect  # noqa: E402

PROMPTS, RESPONSES, CONTEXT = 16, 4, 32768
SETTINGS = {
    "as many groups as are trained on": {},
    "oversample 1.25": {"grpo.oversample": 1.25},
    "oversample 1.25, partial_rollouts": {"grpo.oversample": 1.25, "grpo.partial_rollouts": True},
    "oversample 1.5": {"grpo.oversample": 1.5},
    "oversample 1.5, partial_rollouts": {"grpo.oversample": 1.5, "grpo.partial_rollouts": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    text = table({name: measure(values, arguments.steps) for name, values in SETTINGS.items()}, arguments.steps)
    print(text)
    if arguments.record:
        record("Over-sampling under a heavy tail", text)


def measure(values: dict[str, object], steps: int) -> dict[str, float]:
    """Medians of a step's rollout, and means over all steps."""
    with tempfile.TemporaryDirectory() as folder, TailServer(2, context_length=CONTEXT + 8) as server:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": CONTEXT}))
        recipe = Recipe().with_values(
            {
                "policy.model_name": folder,
                "policy.max_total_sequence_length": CONTEXT,
                "policy.generation.max_new_tokens": CONTEXT - 1024,
                "grpo.num_prompts_per_step": PROMPTS,
                "grpo.num_generations_per_prompt": RESPONSES,
                **values,
            }
        )
        records = ListedPrompts([PromptRecord(f"p{i}", (5 + i % 100, i // 100), "s", "4") for i in range(5000)])
        engine = connect(recipe, [server.url], device="cpu")
        rewards = Rewards(lambda n: float(n % 2))
        controller = Controller(recipe, engine, Tokenizer(), PromptStream(records, seed=1), [], rewards, Logger())
        seconds, lengths, lost, tail = [], [], 0.0, []
        for step in range(1, steps + 1):
            begin = time.perf_counter()
            rollout = controller.collect(step)
            seconds.append(time.perf_counter() - begin)
            lengths += [len(sample.response_ids) for sample in rollout.batch.samples]
            lost += rollout.metrics.get("rollout/discarded_tokens", 0.0)
            tail.append(rollout.metrics["rollout/tail_share"])
        controller.close()
    return {
        "seconds": float(np.median(seconds)),
        "length": float(np.mean(lengths)),
        "lost": lost / (lost + sum(lengths)),
        "tail": float(np.mean(tail)),
    }


def table(measured: dict[str, dict[str, float]], steps: int) -> str:
    """Markdown."""
    plain = next(iter(measured.values()))
    lines = [
        f"{PROMPTS} groups of {RESPONSES} responses a step, {steps} steps; `benchmarks/bench_oversampling.py`.",
        "",
        "| setting | rollout of a step, s (median) | against the first | mean length trained on | against the first "
        "| tokens lost | `rollout/tail_share` |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in measured.items():
        lines.append(
            f"| {name} | {row['seconds']:.3f} | {row['seconds'] / plain['seconds']:.2f} | {row['length']:.1f} "
            f"| {row['length'] / plain['length'] - 1:+.1%} | {row['lost']:.1%} | {row['tail']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
