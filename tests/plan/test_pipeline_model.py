"""The discrete-event model against what can be said in closed form, and against the rule of staleness."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.plan.pipeline_model import Pipeline, simulate
from vespo_megatron.plan.rates import from_runs, lognormal
from vespo_megatron.plan.timing import Server
from vespo_megatron.recipe.loader import load_recipe, save_recipe

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe" / "vespo.yaml"

CONSTANT = Pipeline(
    batch_groups=4,
    group_size=2,
    steps=50,
    server=Server(base=0.1, per_sequence=0.0, slots=100, prefill_tokens_per_second=1e9),
    servers=1,
    draw_length=lambda chance: 10.0,
    train_seconds=3.0,
    sync_seconds=0.5,
)


def test_a_synchronous_step_is_the_sum_of_its_parts():
    forecast = simulate(CONSTANT)
    assert forecast.seconds == pytest.approx(50 * (10 * 0.1 + 3.0 + 0.5))
    assert forecast.trainer_idle == pytest.approx(50 * 1.0)
    assert forecast.engine_idle == pytest.approx(50 * 3.5)
    assert forecast.responses == 50 * 8 and set(forecast.lag_tokens) == {0}


@pytest.mark.parametrize("train, generate", [(3.0, 0.1), (0.5, 0.4)])
def test_an_asynchronous_step_is_the_longer_of_its_parts(train, generate):
    pipeline = replace(
        CONSTANT,
        asynchronous=True,
        max_staleness=4,
        train_seconds=train,
        sync_seconds=0.0,
        steps=200,
        server=Server(base=generate, per_sequence=0.0, slots=8, prefill_tokens_per_second=1e9),
    )
    forecast = simulate(pipeline)
    # Eight slots: a step's eight responses take ten decoding steps.
    assert forecast.seconds / 200 == pytest.approx(max(train, 10 * generate), rel=0.05)


@pytest.mark.parametrize("bound", [0, 1, 2, 5])
@pytest.mark.parametrize("sync_every", [1, 3])
@pytest.mark.parametrize("drain", [False, True])
def test_no_token_is_behind_by_more_than_the_bound(bound, sync_every, drain):
    forecast = simulate(
        replace(
            CONSTANT,
            asynchronous=True,
            max_staleness=bound,
            sync_every=sync_every,
            drain=drain,
            draw_length=lognormal(10, 8, 60),
        )
    )
    assert max(forecast.lag_tokens) <= bound
    assert forecast.responses == 50 * 8


def test_more_servers_and_more_staleness_never_slow_it_down():
    pipeline = replace(CONSTANT, asynchronous=True, max_staleness=2, draw_length=lognormal(20, 15, 200), steps=100)
    pipeline = replace(pipeline, server=replace(pipeline.server, slots=4))
    seconds = [simulate(replace(pipeline, servers=servers)).seconds for servers in (1, 2, 4)]
    assert seconds == sorted(seconds, reverse=True)
    seconds = [simulate(replace(pipeline, max_staleness=bound)).seconds for bound in (0, 1, 4)]
    assert seconds == sorted(seconds, reverse=True)


def test_a_crowded_server_is_slower_for_each():
    crowded = replace(CONSTANT, server=Server(base=0.1, per_sequence=0.05, slots=100, prefill_tokens_per_second=1e9))
    forecast = simulate(crowded)
    assert forecast.seconds == pytest.approx(50 * (10 * (0.1 + 8 * 0.05) + 3.5))


def test_lengths_have_the_mean_and_the_spread_they_were_asked_for():
    import random
    import statistics

    draw, chance = lognormal(100, 60, 1e9), random.Random(0)
    lengths = [draw(chance) for _ in range(20000)]
    assert statistics.fmean(lengths) == pytest.approx(100, rel=0.03)
    assert statistics.stdev(lengths) == pytest.approx(60, rel=0.06)
    assert max(lognormal(100, 60, 150)(chance) for _ in range(1000)) == 150


def test_replies_are_taken_one_after_the_other():
    forecast = simulate(replace(CONSTANT, reply_seconds=0.25))
    assert forecast.seconds == pytest.approx(50 * (10 * 0.1 + 8 * 0.25 + 3.0 + 0.5))
    beside = replace(
        CONSTANT, reply_seconds=0.25, asynchronous=True, max_staleness=4, train_seconds=0.5, sync_seconds=0.0, steps=200
    )
    assert simulate(beside).seconds / 200 == pytest.approx(8 * 0.25, rel=0.05), "replies are what takes longest"


BASE, PER_SEQUENCE, REPLY, TRAIN, SYNC = 0.02, 0.0005, 0.003, 0.01, 0.3


def observed(folder, prompts, *, asynchronous=False, under_way=0):
    """A run as the rates above would have made it, by hand: 8 responses a prompt, 20 tokens each."""
    responses = 8 * prompts
    row = {"response/length_mean": 20.0, "response/length_max": 20.0, "response/length_std": 0.0}
    row |= {"time/sync_weights": SYNC, "time/train": TRAIN * responses}
    if asynchronous:
        running = 8 * under_way
        generating = responses * 20 / running * (BASE + PER_SEQUENCE * running)
        step = generating + SYNC + 0.1
        row |= {"time/step": step, "staleness/under_way": under_way, "staleness/engine_idle_seconds": 0.1}
        row |= {"staleness/trainer_idle_seconds": step - SYNC - TRAIN * responses}
    else:
        generating = 20 * (BASE + PER_SEQUENCE * responses) + REPLY * responses
        row |= {"time/generate": generating, "time/step": generating + SYNC + TRAIN * responses}
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row | {"step": n}) + "\n" for n in range(1, 8)))
    recipe = load_recipe(
        TINY,
        [
            f"grpo.num_prompts_per_step={prompts}",
            f"policy.train_global_batch_size={responses}",
            f"grpo.async_grpo.enabled={str(asynchronous).lower()}",
        ],
    )
    save_recipe(recipe, folder / "recipe.yaml")
    return folder


def test_rates_are_read_back_from_runs(tmp_path):
    runs = [observed(tmp_path / "a", 8), observed(tmp_path / "b", 32)]
    runs.append(observed(tmp_path / "c", 8, asynchronous=True, under_way=24))
    pipeline = from_runs(load_recipe(runs[1] / "recipe.yaml"), runs)
    assert pipeline.server.base == pytest.approx(BASE, rel=1e-3)
    assert pipeline.server.per_sequence == pytest.approx(PER_SEQUENCE, rel=1e-3)
    assert (pipeline.reply_seconds, pipeline.sync_seconds) == pytest.approx((REPLY, SYNC), rel=1e-3)
    assert pipeline.train_seconds == pytest.approx(256 * TRAIN)
    assert simulate(pipeline).seconds / pipeline.steps == pytest.approx(
        20 * (BASE + 256 * PER_SEQUENCE) + 256 * (REPLY + TRAIN) + SYNC
    )


def test_of_one_run_a_token_step_takes_what_it_took_there_and_a_short_run_says_nothing(tmp_path):
    run = observed(tmp_path / "a", 8)
    pipeline = from_runs(load_recipe(run / "recipe.yaml"), [run])
    assert pipeline.server.step(1) == pipeline.server.step(500) and pipeline.reply_seconds == 0
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="has 0 steps after the first 2"):
        from_runs(load_recipe(run / "recipe.yaml"), [run])
