"""Environments answer within their deadlines, and what one does wrong costs its own episode alone."""

from __future__ import annotations

import asyncio
import time

import pytest

from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.environments import EnvironmentPool, Turn
from vespo_megatron.environments.registry import check
from vespo_megatron.errors import UserError
from vespo_megatron.launch.preflight import check_tables
from vespo_megatron.recipe.schema import EnvConfig, Recipe
from vespo_megatron.rewards.guarded import NoAnswer

HERE = "made_up_environments"


def environment(name, **values):
    return EnvConfig(**({"class": f"{HERE}:{name}", "turn_timeout": 10.0} | values))


def record(what=""):
    return PromptRecord("p0", (1, 2), "s", what)


def turn(number=0):
    return Turn(number, (4, 5, 1), "text")


def run(config, scenario):
    pool = EnvironmentPool(config)
    try:
        return asyncio.run(asyncio.wait_for(scenario(pool), 60))
    finally:
        pool.close()


async def called(episode, what, *steps):
    """Per call what it answered, or why it did not."""
    found = []
    for call in (lambda: episode.reset(record(what)), *(lambda n=n: episode.step(turn(n)) for n in steps)):
        try:
            found.append(await call())
        except NoAnswer as why:
            found.append((why.kind, why.failure))
    return found


@pytest.mark.parametrize("name", ["Echo", "AsyncEcho"])
@pytest.mark.parametrize("processes", [0, 2], ids=["here", "in processes"])
def test_an_episode_is_reset_and_stepped_whether_its_methods_are_coroutines_or_not(name, processes):
    async def scenario(pool):
        async with pool.episodes(2) as (one, two):
            assert await one.reset(record()) is None and await two.reset(record()) is None
            return await asyncio.gather(one.step(turn(1)), two.step(turn(2)))

    one, two = run(environment(name, num_environments=processes), scenario)
    assert one.observation == [{"role": "tool", "content": "3 tokens"}]
    assert (one.reward, one.done, one.tool_errors) == (1.0, False, 1)
    assert (two.reward, two.done, two.tool_errors) == (2.0, True, 0)


@pytest.mark.parametrize(
    ("what", "kind", "failure"),
    [("sleep 1", "timeout", ""), ("die 1", "died", ""), ("raise 1", "error", "RuntimeError: as told")],
)
def test_a_step_that_hangs_dies_or_raises_costs_its_episode_alone(what, kind, failure):
    async def scenario(pool):
        async with pool.episodes(2) as (bad, good):
            both = await asyncio.gather(called(bad, what, 0, 1), called(good, "", 0, 1, 2))
        async with pool.episodes(1) as (again,):
            return *both, await called(again, "", 0)

    started = time.monotonic()
    bad, good, again = run(environment("Hostile", num_environments=2, turn_timeout=1.0), scenario)
    assert bad[2] == (kind, failure) and bad[1] == ("on", 1.0, False, 0)
    assert [each[2] for each in good[1:]] == [False, False, True] and again[1][0] == "on"
    assert time.monotonic() - started < 40


def test_a_reset_that_raises_is_told_as_well():
    async def scenario(pool):
        async with pool.episodes(1) as (bad,):
            return await called(bad, "raise reset")

    assert run(environment("Hostile", num_environments=1), scenario) == [("error", "RuntimeError: as told")]


def test_in_this_process_a_coroutine_that_is_late_is_given_up():
    async def scenario(pool):
        async with pool.episodes(1) as (one,):
            one.host.step = lambda turn: asyncio.sleep(60)
            return await called(one, "", 0)

    assert run(environment("Echo", num_environments=0, turn_timeout=0.2), scenario)[1] == ("timeout", "")


@pytest.mark.parametrize("answer", [("x", float("nan"), False), ("x", True, False), ("x", "much", False), 7])
def test_a_step_that_has_no_form_is_an_error_of_its_episode(answer):
    async def scenario(pool):
        async with pool.episodes(1) as (one,):
            one.host.step = lambda turn: answer
            return await called(one, "", 0)

    assert run(environment("Echo", num_environments=0), scenario)[1][0] == "error"


def test_processes_are_kept_for_the_next_episodes_and_no_more_are_alive_than_the_limit():
    async def scenario(pool):
        async def one():
            async with pool.episodes(1) as (episode,):
                await episode.reset(record())
                return (await episode.step(turn())).observation

        seen = set(await asyncio.gather(*(one() for _ in range(12))))
        async with pool.episodes(3) as three:
            for each in three:
                await each.reset(record())
            return seen, {(await each.step(turn())).observation for each in three}

    seen, three = run(environment("Pids", num_environments=3), scenario)
    assert len(seen) <= 3 and len(three) == 3 and seen <= three


def test_two_that_each_want_all_of_them_do_not_wait_for_each_other():
    async def scenario(pool):
        async def all_of_them():
            async with pool.episodes(3) as three:
                return [await each.reset(record()) for each in three]

        return await asyncio.gather(*(all_of_them() for _ in range(4)))

    assert run(environment("Echo", num_environments=3), scenario) == [[None] * 3] * 4


def test_an_episode_given_up_in_its_call_leaves_its_process_to_nobody_until_that_has_ended():
    async def scenario(pool):
        async def hang():
            async with pool.episodes(1) as (one,):
                await called(one, "sleep 0", 0)

        task = asyncio.create_task(hang())
        await asyncio.sleep(1.0)
        task.cancel()
        async with pool.episodes(1) as (next_one,):
            found = await called(next_one, "", 0)
        await asyncio.gather(task, return_exceptions=True)
        return found

    assert run(environment("Hostile", num_environments=1, turn_timeout=2.0), scenario)[1][0] == "on"


def test_an_environment_that_raises_on_everything_ends_the_run_with_what_it_raised():
    async def scenario(pool):
        pool.note(["a", "b"], ["RuntimeError: no", "RuntimeError: no"])

    with pytest.raises(UserError, match="raised on each of 2 responses; on the first: RuntimeError: no"):
        run(environment("Echo", num_environments=0), scenario)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"class": "no_such_word"}, "env.class: is 'no_such_word'"),
        ({"class": "no.such:Class"}, "cannot be imported"),
        ({"class": f"{HERE}:record"}, "cannot be imported"),
        ({"class": "pathlib:Path"}, "has no reset and no step"),
        ({"class": f"{HERE}:Echo", "options": {"turn": 3}}, r"env.options: do not fit .*'turn'"),
    ],
)
def test_what_is_no_environment_is_told_before_one_is_made(values, message):
    with pytest.raises(UserError, match=message):
        check(EnvConfig(**values))


def test_a_recipe_is_checked_for_it_before_anything_starts():
    recipe = Recipe().with_values({"env.class": "no.such:Class", "env.reward": "none"})
    with pytest.raises(UserError, match="env.class: 'no.such:Class' cannot be imported"):
        check_tables(recipe)
    check_tables(recipe.with_values({"env.class": "calculator"}))


def test_a_pool_that_is_closed_in_the_middle_of_a_call_leaves_no_process():
    pool = EnvironmentPool(environment("Hostile", num_environments=1, turn_timeout=30.0))

    async def scenario():
        async with pool.episodes(1) as (one,):
            asyncio.get_running_loop().call_later(1.0, pool.close)
            return await called(one, "sleep 0", 0)

    started = time.monotonic()
    assert asyncio.run(scenario())[1] == ("died", "")
    assert time.monotonic() - started < 20
    assert not any(process._process.is_alive() for process in pool._made)


def test_a_constructor_that_raises_is_one_error_that_says_so():
    async def scenario(pool):
        async with pool.episodes(1) as (one,):
            await one.reset(record())

    for processes in (0, 1):
        with pytest.raises(
            UserError, match="environment made_up_environments:Echo.*raised when it was made: ValueError"
        ):
            run(environment("Echo", options={"turns": 0}, num_environments=processes), scenario)
