"""Asynchronous against synchronous training: wall time of the same updates.

    python benchmarks/bench_async.py [--record]

The tiny example's training in one process, against an engine that takes time and no core: random responses,
each group after a log-normal delay, as many groups at once as a batch has. The delay is chosen so that a synchronous
step generates about as long as it trains. Compared is the time from the first step's begin to the last one's end. What
accuracy it costs is the asynchronous study's question (examples/studies/asynchronous.yaml).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import tempfile
from pathlib import Path

import numpy as np

from vespo_megatron.recipe.loader import load_recipe, save_recipe
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult

RECIPE = "examples/tiny_moe/vespo.yaml"
ALONE = [
    "policy.megatron_cfg.tensor_model_parallel_size=1",
    "policy.megatron_cfg.sequence_parallel=false",
    "policy.megatron_cfg.expert_model_parallel_size=1",
    "cluster.gpus_per_node=1",
    "logger.tensorboard_enabled=false",
]
ASYNC = ["grpo.async_grpo.enabled=true"]
ON_TIME = ["grpo.num_prompts_per_step=8", "policy.train_global_batch_size=64"]  # a step is an update, as in the paper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    text = wall_time(arguments)
    print(text)
    if arguments.record:
        from results import record

        record("Asynchronous wall time", text)


def wall_time(arguments: argparse.Namespace) -> str:
    """Markdown. The delay is chosen so that generation and training of the synchronous run take equal shares."""
    train = statistics.median(row["time/train"] for row in run(arguments.steps // 4, 0.0, [])[2:])
    delay = train / 1.5  # the longest of eight takes about 1.5 times the median
    settings = {
        "synchronous": [],
        "one step off (max_staleness 1)": [*ASYNC, "grpo.async_grpo.max_staleness=1"],
        "max_staleness 1, weights every 4 steps": [
            *ASYNC,
            "grpo.async_grpo.staleness_threshold=1",
            "grpo.async_grpo.sync_every=4",
        ],
        "max_staleness 4": [*ASYNC, "grpo.async_grpo.max_staleness=4"],
    }
    lines = [
        f"{arguments.steps} updates of 64 responses, one trainer process; generation is simulated: "
        f"{delay * 1000:.0f} ms a group in the median, eight groups at once. "
        f"Training takes {train * 1000:.0f} ms a step.",
        "",
        "| | seconds | of synchronous | trainer idle | engine idle | mean lag |",
        "|---|---|---|---|---|---|",
    ]
    reference = None
    for name, overrides in settings.items():
        rows = run(arguments.steps, delay, overrides)
        seconds = rows[-1]["wall_time"] - rows[0]["wall_time"] + rows[0]["time/step"]
        reference = reference or seconds
        idle = sum(row.get("staleness/trainer_idle_seconds", row["time/generate"]) for row in rows)
        engine = sum(row.get("staleness/engine_idle_seconds", row["time/step"] - row["time/generate"]) for row in rows)
        lag = statistics.fmean(row.get("staleness/lag_mean", 0.0) for row in rows)
        shares = f"{idle / seconds:.0%} | {engine / seconds:.0%}"
        lines.append(f"| {name} | {seconds:.1f} | {seconds / reference:.2f} | {shares} | {lag:.2f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def run(steps: int, delay: float, overrides: list[str]) -> list[dict[str, float]]:
    """The metrics of a run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(
            RECIPE,
            [
                *ALONE,
                *ON_TIME,
                f"grpo.max_num_steps={steps}",
                "grpo.val_period=0",
                "checkpointing.save_hf=false",
                "policy.generation.backend=in_process",
                *overrides,
            ],
        )
        save_recipe(recipe, Path(folder) / "recipe.yaml")
        process = multiprocessing.get_context("spawn").Process(target=_train, args=(folder, delay))
        process.start()
        process.join(600)
        assert process.exitcode == 0, Path(folder) / "errors"
        return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def _train(folder: str, delay: float) -> None:
    import torch

    from vespo_megatron.launch import worker
    from vespo_megatron.launch.launcher import ALONE

    with (Path(folder) / "output").open("w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.environ |= ALONE
    worker.build_engine = lambda recipe: SimulatedEngine(delay, recipe.grpo.num_prompts_per_step)
    os._exit(worker.main(Path(folder)))


class SimulatedEngine:
    """Takes time and no core: random responses, each group after its own delay, as many at once as a batch has.

    When it is paused, what runs is ended and begins anew afterwards (its tokens are kept by nobody: they are random).
    """

    description = "simulated"

    def __init__(self, delay: float, capacity: int) -> None:
        self.delay, self.weight_version, self._paused = delay, 0, False
        self._chance, self._places = random.Random(0), asyncio.Semaphore(capacity)

    async def generate(self, requests, *, on_result=None):
        groups: dict[str, list[GenerationRequest]] = {}
        for request in requests:
            groups.setdefault(request.group_id, []).append(request)
        answered = await asyncio.gather(*(self._group(group) for group in groups.values()))
        results = {result.request_id: result for group in answered for result in group}
        return [results[request.request_id] for request in requests]

    async def _group(self, requests):
        async with self._places:
            await asyncio.sleep(self.delay * self._chance.lognormvariate(0.0, 0.3))
        return [self._result(request) for request in requests]

    def _result(self, request) -> GenerationResult:
        length = self._chance.randint(8, request.sampling.max_new_tokens)
        return GenerationResult(
            request.request_id,
            np.array([self._chance.randrange(10) for _ in range(length)]),
            np.full(length, -2.0, np.float32),
            np.full(length, self.weight_version),
            "stop",
        )

    def update_weights(self, named_tensors, version):
        for _ in named_tensors:
            pass
        self.weight_version = version

    async def pause(self):
        """Nothing stands in the way of new weights."""

    resume = pause

    def metrics(self):
        return {}

    def close(self):
        """Nothing is held."""


if __name__ == "__main__":
    main()
