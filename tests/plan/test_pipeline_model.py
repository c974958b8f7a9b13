"""The discrete-event model against what can be said in closed form, and against the rule of staleness."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vespo_megatron.plan.pipeline_model import Pipeline, simulate
from vespo_megatron.plan.rates import _line, lognormal
from vespo_megatron.plan.timing import Server

CONSTANT = Pipeline(
    batch_groups=4, group_size=2, steps=50, server=Server(base=0.1, per_sequence=0.0, slots=100,
    prefill_tokens_per_second=1e9), servers=1, draw_length=lambda chance: 10.0, train_seconds=3.0, sync_seconds=0.5,
)  # fmt: skip


def test_a_synchronous_step_is_the_sum_of_its_parts():
    forecast = simulate(CONSTANT)
    assert forecast.seconds == pytest.approx(50 * (10 * 0.1 + 3.0 + 0.5))
    assert forecast.trainer_idle == pytest.approx(50 * 1.0)
    assert forecast.engine_idle == pytest.approx(50 * 3.5)
    assert forecast.responses == 50 * 8 and set(forecast.lag_tokens) == {0}


@pytest.mark.parametrize("train, generate", [(3.0, 0.1), (0.5, 0.4)])
def test_an_asynchronous_step_is_the_longer_of_its_parts(train, generate):
    pipeline = replace(
        CONSTANT, asynchronous=True, max_staleness=4, train_seconds=train, sync_seconds=0.0, steps=200,
        server=Server(base=generate, per_sequence=0.0, slots=8, prefill_tokens_per_second=1e9),
    )  # fmt: skip
    forecast = simulate(pipeline)
    # Eight slots: a step's eight responses take ten decoding steps.
    assert forecast.seconds / 200 == pytest.approx(max(train, 10 * generate), rel=0.05)


@pytest.mark.parametrize("bound", [0, 1, 2, 5])
@pytest.mark.parametrize("sync_every", [1, 3])
@pytest.mark.parametrize("drain", [False, True])
def test_no_token_is_behind_by_more_than_the_bound(bound, sync_every, drain):
    forecast = simulate(
        replace(
            CONSTANT, asynchronous=True, max_staleness=bound, sync_every=sync_every, drain=drain,
            draw_length=lognormal(10, 8, 60),
        )
    )  # fmt: skip
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


@pytest.mark.parametrize(
    "points, line",
    [
        ([(8, 0.3), (16, 0.5)], (0.1, 0.025)),
        ([(8, 0.3)], (0.3, 0.0)),
        ([(8, 0.5), (16, 0.3)], (0.4, 0.0)),
        ([(1, 0.1), (3, 0.5)], (0.0, 0.16)),
    ],
)
def test_a_line_through_what_was_seen_is_never_negative(points, line):
    assert _line(points) == pytest.approx(line)
