"""`vespo-megatron simulate RECIPE`: the pace of a pipeline before it is run, and how to split its devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vespo_megatron.megatron.hardware import GPU, TRAINING_MFU
from vespo_megatron.plan.pipeline_model import Forecast, Pipeline, simulate
from vespo_megatron.plan.planner import plan
from vespo_megatron.plan.published import shape_of
from vespo_megatron.plan.rates import from_plan, from_runs
from vespo_megatron.plan.timing import Lengths
from vespo_megatron.recipe.schema import Recipe

_STEPS = 200
"""Enough for a steady state, however long the run is."""


def report(
    recipe: Recipe,
    *,
    runs: Sequence[str | Path] = (),
    device: GPU | None = None,
    lengths: Lengths,
    mfu: float = TRAINING_MFU,
) -> str:
    """The forecast of the recipe, and with `device` a table of splits of its devices. One of runs, device is given."""
    if runs:
        pipeline = from_runs(recipe, runs)
        return _text(replace(pipeline, steps=min(_STEPS, pipeline.steps)))
    assert device is not None
    shape = shape_of(recipe.policy.model_name)
    first = plan(shape, recipe, device, lengths, mfu)
    pipeline = replace(from_plan(first, lengths), steps=min(_STEPS, recipe.grpo.max_num_steps))
    lines = [_text(pipeline), ""]
    per_server = recipe.policy.generation.sglang_cfg.tensor_parallel_size
    total = recipe.world_size + pipeline.servers * per_server
    lines.append(f"splits of {total} {device.name}:")
    lines.append(
        f"{'train':>7}{'rollout':>9}{'responses/s':>13}{'trainer idle':>14}{'engine idle':>13}{'mean lag':>10}"
    )
    best: tuple[float, int] | None = None
    for train in range(recipe.model_parallel_size, total, max(recipe.model_parallel_size, total // 16)):
        servers = (total - train) // per_server
        if not servers or train % recipe.model_parallel_size:
            continue
        split = replace(pipeline, servers=servers, train_seconds=pipeline.train_seconds * recipe.world_size / train)
        forecast = simulate(split)
        mark = "  <- the recipe's" if train == recipe.world_size else ""
        lines.append(f"{train:7}{servers * per_server:9}{_row(forecast)}{mark}")
        if best is None or forecast.responses_per_second > best[0]:
            best = (forecast.responses_per_second, train)
    if best is not None:
        lines.append(f"fastest: {best[1]} train, {total - best[1]} generate")
    return "\n".join(lines)


def _row(forecast: Forecast) -> str:
    return (
        f"{forecast.responses_per_second:13.2f}{forecast.trainer_idle / forecast.seconds:14.0%}"
        f"{forecast.engine_idle / forecast.seconds:13.0%}{forecast.lag_mean:10.2f}"
    )


def _text(pipeline: Pipeline) -> str:
    forecast = simulate(pipeline)
    total = sum(forecast.lag_tokens.values()) or 1.0
    shares = ", ".join(f"{lag}: {tokens / total:.0%}" for lag, tokens in sorted(forecast.lag_tokens.items()))
    mode = "synchronous"
    if pipeline.asynchronous:
        mode = f"asynchronous, max_staleness {pipeline.max_staleness:g}, weights every {pipeline.sync_every} steps"
    return "\n".join(
        [
            f"{mode}: {pipeline.batch_groups} groups of {pipeline.group_size} a step, {pipeline.servers} servers",
            f"{forecast.responses_per_second:.2f} responses/s, {forecast.seconds / pipeline.steps:.2f} s a step",
            f"trainer idle {forecast.trainer_idle / forecast.seconds:.0%}, "
            f"engine idle {forecast.engine_idle / forecast.seconds:.0%}",
            f"tokens by lag in weight versions: {shares} (mean {forecast.lag_mean:.2f})",
        ]
    )
