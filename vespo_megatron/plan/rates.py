"""What a pipeline model needs to know, from a plan's estimates or from runs that were made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from vespo_megatron.errors import UserError
from vespo_megatron.plan.pipeline_model import DrawLength, Pipeline
from vespo_megatron.plan.planner import Plan
from vespo_megatron.plan.timing import Lengths, Server
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.metrics_file import METRICS_FILE, read_metrics
from vespo_megatron.run.run_directory import RECIPE_FILE

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
        recipe,
        plan.server,
        plan.servers,
        plan.train,
        plan.sync,
        lognormal(lengths.response, spread * lengths.response, recipe.policy.generation.max_new_tokens),
    )


def from_runs(recipe: Recipe, run_dirs: Sequence[str | Path]) -> Pipeline:
    """Of measurements: runs of the same model on the same machines, whatever their batch and staleness.

    Training time is taken per response, what the server and the controller take is fitted to the seconds in which the
    runs' responses were generated: with runs of one setting a constant per token, of two also what each running
    response adds, and with three, synchronous and asynchronous ones among them, what a reply costs the controller.
    The forecast holds for numbers of running responses within what the runs show.
    """
    observed = [_observe(Path(folder)) for folder in run_dirs]
    base, per_sequence, reply = _fit(observed)
    server = Server(base, per_sequence, recipe.policy.generation.sglang_cfg.max_concurrent_requests, math.inf)
    # Weights that interrupt what runs, and training beside a busy controller, take longer: what they cost is taken
    # from runs of the recipe's kind.
    alike = [one for one in observed if one.asynchronous == recipe.grpo.async_grpo.enabled] or observed
    mean = statistics.fmean(one.length_mean for one in observed)
    deviation = statistics.fmean(one.length_deviation for one in observed)
    train = statistics.median(one.train_per_response for one in alike) * recipe.rollout_batch_size
    return _pipeline(
        recipe,
        server,
        max(1, recipe.policy.generation.sglang_cfg.num_servers),
        train,
        statistics.median(one.sync for one in alike),
        lognormal(mean, deviation, recipe.policy.generation.max_new_tokens),
        reply,
    )


def _pipeline(
    recipe: Recipe, server: Server, servers: int, train: float, sync: float, draw_length: DrawLength, reply: float = 0.0
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
        reply_seconds=reply,
        asynchronous=asynchronous.enabled,
        max_staleness=asynchronous.staleness,
        sync_every=asynchronous.sync_every,
        drain=asynchronous.on_weight_update == "drain",
    )


@dataclass(frozen=True)
class _Observed:
    """Means over a run's steps; seconds, tokens, responses."""

    asynchronous: bool
    setting: tuple[object, ...]
    """The same for runs that are repetitions."""
    responses: int
    train_per_response: float
    sync: float
    """Of one update of the engine."""
    generating: float
    """In which a batch's worth of responses was generated; replies to them included where that is waited for."""
    token_steps: float
    """How many times in that each running response gained a token."""
    length_mean: float
    length_deviation: float


def _observe(folder: Path) -> _Observed:
    rows = [row for row in read_metrics(folder) if row["step"] > _WARM_UP] if folder.is_dir() else []
    if len(rows) < 3:
        raise UserError(
            f"has {len(rows)} steps after the first {_WARM_UP} in {METRICS_FILE}",
            where=str(folder),
            expected="a run of five steps or more",
        )
    recipe = load_recipe(folder / RECIPE_FILE)
    responses, schedule = recipe.rollout_batch_size, recipe.grpo.async_grpo

    def mean(name: str) -> float:
        return statistics.fmean(row.get(name) or 0.0 for row in rows)

    length, step, sync = mean("response/length_mean"), mean("time/step"), mean("time/sync_weights")
    if schedule.enabled:
        idle = mean("staleness/trainer_idle_seconds")
        generating = max(0.0, step - mean("staleness/engine_idle_seconds") - sync)  # it stands still for new weights
        token_steps = responses * length / (mean("staleness/under_way") * recipe.grpo.num_generations_per_prompt)
    else:
        generating = idle = mean("time/generate")
        token_steps = mean("response/length_max")
    return _Observed(
        asynchronous=schedule.enabled,
        setting=(schedule.enabled, schedule.staleness, schedule.sync_every, responses),
        responses=responses,
        train_per_response=(step - idle - sync) / responses,
        sync=sync * (schedule.sync_every if schedule.enabled else 1),
        generating=generating,
        token_steps=token_steps,
        length_mean=length,
        length_deviation=mean("response/length_std"),
    )


def _fit(observed: Sequence[_Observed]) -> tuple[float, float, float]:
    """Seconds of a token step: alone, and more per running response; and of a reply. None below zero.

    generating = base · token_steps + per_sequence · tokens + reply · responses, by least squares of the relative error;
    the last in synchronous runs alone, where replies are waited for.
    """
    settings = {one.setting for one in observed}
    both_kinds = len({one.asynchronous for one in observed}) == 2
    unknowns = 1 + (len(settings) > 1) + (len(settings) > 2 and both_kinds)
    rows = [
        (one.token_steps, one.responses * one.length_mean, 0.0 if one.asynchronous else one.responses)[:unknowns]
        for one in observed
    ]
    relative = np.array(rows) / np.array([[one.generating] for one in observed])
    solution, _ = nnls(relative, np.ones(len(observed)))
    base, per_sequence, reply = [*solution, 0.0, 0.0][:3]
    return base, per_sequence, reply
