"""Time of a training step against tokens, sequences, experts, layers and ranks, with the slope of each on log-log axes.

    python benchmarks/bench_scaling.py [--record]

One thing is changed at a time. A step is what the trainer does with a rollout batch: packing, slicing, the forward and
backward of every micro-batch, the optimizer, the metrics. Every rank is a process with one thread; expert parallel over
all of them. The slope is fitted to the upper half of each axis, where constants no longer hide what grows. With
--record, the figure goes to `benchmarks/scaling.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_VOCABULARY = 1024
_STEPS = 3


@dataclass(frozen=True)
class Case:
    """A model and what a step trains on; sequences are of one length, half of it response."""

    layers: int = 4
    experts: int = 16
    sequences: int = 16
    length: int = 128
    ranks: int = 1


AXES = {
    "tokens of a sequence": [Case(sequences=4, length=length) for length in (256, 512, 1024, 2048, 4096, 8192)],
    "sequences": [Case(sequences=count) for count in (4, 8, 16, 32, 64, 128)],
    "experts": [Case(experts=count) for count in (8, 16, 32, 64, 128, 256)],
    "layers": [Case(layers=count) for count in (1, 2, 4, 8, 16, 32)],
    "ranks, same work each": [Case(sequences=16 * count, ranks=count) for count in (1, 2, 4, 8)],
}


def value(case: Case, axis: str) -> int:
    """Where on its axis the case is."""
    if axis == "tokens of a sequence":
        return case.length
    return getattr(case, axis.split(",")[0])


def make_model(case: Case, folder: Path) -> None:
    """A random model of hidden size 128."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=_VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=case.experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        mlp_only_layers=[],
        max_position_embeddings=16384,
    )
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)


def world(rank: int, ranks: int, folder: str, cases: list[Case]) -> None:
    """One rank's process: measure every case; rank 0 writes `seconds.json`."""
    import torch
    import torch.distributed as dist

    from vespo_megatron.megatron import parallel
    from vespo_megatron.recipe.schema import MegatronConfig

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    layout = MegatronConfig(expert_model_parallel_size=ranks)
    rank_info = parallel.initialize(layout, seed=1, device=torch.device("cpu"), init_method=f"file://{folder}/store")
    found = []
    for number, case in enumerate(cases):
        model = Path(folder) / f"model_{number}"
        if rank == 0:
            make_model(case, model)
        dist.barrier()
        found.append(step_seconds(case, model, rank_info, layout))
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(found))
    parallel.finalize()


def step_seconds(case: Case, model: Path, rank_info, layout) -> float:
    """Median of the steps after the first."""
    import torch.distributed as dist

    from benchmarks.training_step import train_step
    from vespo_megatron.data.batch import Batch
    from vespo_megatron.data.sample import Sample
    from vespo_megatron.megatron.policy import MegatronPolicy
    from vespo_megatron.recipe.schema import Recipe
    from vespo_megatron.trainer.objective import Objective

    recipe = Recipe().with_values(
        {
            "policy.model_name": str(model),
            "policy.precision": "float32",
            "policy.train_global_batch_size": case.sequences,
            "policy.sequence_packing.train_mb_tokens": max(2048, case.length),
            "policy.megatron_cfg": layout,
        }
    )
    policy, objective = (
        MegatronPolicy(recipe.policy, rank_info, total_updates=1000),
        Objective(recipe.loss_fn, recipe.behavior),
    )
    chance, half = np.random.default_rng(0), case.length // 2
    samples = [
        Sample(
            sample_id=str(index),
            prompt_id=str(index),
            prompt_ids=chance.integers(3, _VOCABULARY, half),
            response_ids=chance.integers(3, _VOCABULARY, half),
            behavior_log_probs=np.full(half, -7.0),
            weight_versions=np.zeros(half),
            finish_reason="stop",
        )
        for index in range(case.sequences)
    ]
    batch = Batch(samples, chance.normal(size=case.sequences).astype(np.float32))
    seconds = []
    for _ in range(_STEPS + 1):
        dist.barrier()
        started = time.perf_counter()
        train_step(batch, recipe, policy, objective)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measure(cases: list[Case]) -> list[float]:
    """Seconds of a step of every case; all of one number of ranks."""
    from torch import multiprocessing

    ranks = cases[0].ranks
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(world, (ranks, folder, cases), nprocs=ranks)
        return json.loads((Path(folder) / "seconds.json").read_text())


def slope(points: list[tuple[int, float]]) -> float:
    """Of log seconds over log value, in the upper half."""
    upper = points[len(points) // 2 :] if len(points) > 4 else points[1:]
    return statistics.linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in upper), strict=True)).slope


def draw(found: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """One log-log plot per axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(found), 2.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (axis, points) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        axes.loglog(*zip(*points, strict=True), marker="o", base=2)
        axes.set(title=f"{axis}\nslope {slope(points):.2f}", ylabel="seconds a step")
        axes.grid(alpha=0.25, which="both")
    figure.savefig(path)


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    alone = [(axis, case) for axis, cases in AXES.items() for case in cases if case.ranks == 1]
    found: dict[str, list[tuple[int, float]]] = {axis: [] for axis in AXES}
    for (axis, case), seconds in zip(alone, measure([case for _, case in alone]), strict=True):
        found[axis].append((value(case, axis), seconds))
    for axis, cases in AXES.items():
        for case in cases:
            if case.ranks > 1:
                found[axis].append((value(case, axis), measure([case])[0]))
    lines = [
        f"Otherwise {asdict(Case())}, hidden 128, top-2; median of {_STEPS} steps, one thread a rank. "
        f"Slopes of the upper half. ![log-log plots](scaling.png)",
        "",
        "| axis | value: seconds | slope |",
        "|---|---|---|",
    ]
    for axis, points in found.items():
        cells = ", ".join(f"{x}: {y:.3f}" for x, y in points)
        lines.append(f"| {axis} | {cells} | {slope(points):.2f} |")
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        from benchmarks.results import record

        draw(found, ROOT / "benchmarks" / "scaling.png")
        record("Scaling of a step", text)


if __name__ == "__main__":
    main()
