"""What a pipeline model needs to know, from a plan's estimates or from runs that were made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from vespo_megatron.errors import UserError
from vespo_megatron.plan.pipeline_model import DrawLength, Pipeline
from vespo_megatron.plan.planner import Plan
from vespo_megatron.plan.timing import Lengths, Server
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.trainer.logging import METRICS_FILE, read_metrics
from vespo_megatron.trainer.run_directory import RECIPE_FILE

_WARM_UP = 2
"""Steps of a run that are not looked at."""


def lognormal(mean: float, deviation: float, longest: float) -> DrawLength:
    """Lengths of this mean and standard deviation before they are cut at `longest`."""
    if deviation <= 0:
        return lambda chance: min(mean, longest)
    variance = math.log(1 + (deviation / mean) ** 2)
    centre, width = math.log(mean) - variance / 2, math.sqrt(variance)
    return lambda chance: min(longest, chance.lognormvariate(centre, width))


def from_plan(plan: Plan, lengths: Lengths, *, spread: float = 0.7) -> Pipeline:
    """Of estimates. `spread` is the deviation of response lengths over their mean."""
    recipe = plan.recipe
    return _pipeline(
        recipe, plan.server, plan.servers, plan.train, plan.sync,
        lognormal(lengths.response, spread * lengths.response, recipe.policy.generation.max_new_tokens),
    )  # fmt: skip


def from_runs(recipe: Recipe, run_dirs: Sequence[str | Path]) -> Pipeline:
    """Of measurements: runs of the same model on the same machines, whatever their batch and staleness.

    Training time is taken per response, a server's time per token as a line through what the runs show at their
    numbers of running responses (through one point only, where there is one run: a constant).
    """
    observed = [_observe(Path(folder)) for folder in run_dirs]
    train = statistics.median(one["train_per_response"] for one in observed)
    points = [(one["running"], one["token_seconds"]) for one in observed]
    base, slope = _line(points)
    server = Server(base, slope, recipe.policy.generation.sglang_cfg.max_concurrent_requests, math.inf)
    # Weights that interrupt what runs take longer: what they cost is taken from runs of the recipe's kind.
    kind = float(recipe.grpo.async_grpo.enabled)
    alike = [one for one in observed if one["asynchronous"] == kind] or observed
    mean = statistics.fmean(one["length_mean"] for one in observed)
    deviation = statistics.fmean(one["length_deviation"] for one in observed)
    return _pipeline(
        recipe, server, max(1, recipe.policy.generation.sglang_cfg.num_servers), train * recipe.rollout_batch_size,
        statistics.median(one["sync"] for one in alike),
        lognormal(mean, deviation, recipe.policy.generation.max_new_tokens),
    )  # fmt: skip


def _pipeline(
    recipe: Recipe, server: Server, servers: int, train: float, sync: float, draw_length: DrawLength
) -> Pipeline:
    asynchronous = recipe.grpo.async_grpo
    return Pipeline(
        batch_groups=recipe.grpo.num_prompts_per_step,
        group_size=recipe.grpo.num_generations_per_prompt,
        steps=recipe.grpo.max_num_steps,
        server=server,
        servers=servers,
        draw_length=draw_length,
        train_seconds=train,
        sync_seconds=sync,
        asynchronous=asynchronous.enabled,
        max_staleness=asynchronous.staleness,
        sync_every=asynchronous.sync_every,
        drain=asynchronous.on_weight_update == "drain",
    )


def _observe(folder: Path) -> dict[str, float]:
    rows = [row for row in read_metrics(folder) if row["step"] > _WARM_UP] if folder.is_dir() else []
    if len(rows) < 3:
        raise UserError(
            f"has {len(rows)} steps after the first {_WARM_UP} in {METRICS_FILE}", where=str(folder),
            expected="a run of five steps or more",
        )  # fmt: skip
    recipe = load_recipe(folder / RECIPE_FILE)
    responses = recipe.rollout_batch_size

    def median(name: str) -> float:
        return statistics.median(row.get(name) or 0.0 for row in rows)

    length = median("response/length_mean")
    if recipe.grpo.async_grpo.enabled:
        idle = median("staleness/trainer_idle_seconds")
        running = median("staleness/under_way") * recipe.grpo.num_generations_per_prompt
        seconds = statistics.fmean(row["time/step"] - (row.get("staleness/engine_idle_seconds") or 0.0) for row in rows)
        token_seconds = running * seconds / (responses * length)
    else:
        idle, longest = median("time/generate"), median("response/length_max")
        running, token_seconds = responses * length / longest, idle / longest
    sync = median("time/sync_weights")
    return {
        "asynchronous": float(recipe.grpo.async_grpo.enabled),
        "train_per_response": (median("time/step") - idle - sync) / responses,
        "sync": sync,
        "running": running,
        "token_seconds": token_seconds,
        "length_mean": length,
        "length_deviation": median("response/length_std"),
    }


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope by least squares, neither below zero."""
    if len({x for x, _ in points}) < 2:
        return statistics.fmean(y for _, y in points), 0.0
    slope, intercept = statistics.linear_regression([x for x, _ in points], [y for _, y in points])
    if slope < 0:
        return statistics.fmean(y for _, y in points), 0.0
    if intercept < 0:
        return 0.0, sum(x * y for x, y in points) / sum(x * x for x, _ in points)
    return intercept, slope
