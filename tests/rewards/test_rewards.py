"""Rewards score what they should, and nothing hangs or ends the run."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from scoring import score

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards import RewardPool, RewardRequest
from vespo_megatron.rewards.answers import last_boxed
from vespo_megatron.rewards.functions import exact_match


def hostile(data_source, solution_str, ground_truth, extra_info):
    """Sleeps, dies, raises or answers, as it is told."""
    if solution_str == "sleep":
        time.sleep(60)
    if solution_str == "die":
        os._exit(9)
    if solution_str == "raise":
        raise RuntimeError
    return {"score": 0.5, "format": 1, "note": "text"}


def test_the_last_complete_box_is_the_answer():
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}} and \boxed{3") == r"\frac{1}{2}"
    assert last_boxed("nothing") is None


def test_exact_match_compares_the_box_or_the_whole():
    assert exact_match("s", r"3 + 1 = \boxed{ 4 }", 4, {}) == 1.0
    assert exact_match("s", " 4 ", "4", {}) == 1.0
    assert exact_match("s", r"4 \boxed{5}", "4", {}) == 0.0


def test_math_verify_knows_equal_answers():
    results = score(EnvConfig(reward="math"), r"so \boxed{0.5}", r"\boxed{\frac{2}{4}}", r"\boxed{2}", "", truth="1/2")
    assert [result.reward for result in results] == [1.0, 1.0, 0.0, 0.0]


def test_a_hanging_dying_or_raising_reward_scores_nothing_and_the_next_is_scored():
    env = EnvConfig(reward=f"{__name__}:hostile", timeout=0.5)
    started = time.monotonic()
    sleep, die, fail, good = score(env, "sleep", "die", "raise", "fine")
    assert [(one.reward, dict(one.parts), one.unscored) for one in (sleep, die, fail)] == [
        (0.0, {}, "timeout"),
        (0.0, {}, "died"),
        (0.0, {}, "error"),
    ]
    assert (good.reward, dict(good.parts)) == (0.5, {"format": 1.0})
    assert time.monotonic() - started < 30


def rows(*numbers, responses=2):
    return [
        RewardRequest("s", "fine" if number is None else "raise", "4", row=str(number))
        for number in numbers
        for _ in range(responses)
    ]


def score_calls(env, *calls):
    pool = RewardPool(env)

    async def one_after_another():
        return [await pool.score(call) for call in calls]

    try:
        return asyncio.run(one_after_another())
    finally:
        pool.close()


@pytest.mark.parametrize("size", [10, 10_000_000])
@pytest.mark.parametrize(
    ("signum", "unscored"),
    [
        (signal.SIGSTOP, "timeout"),
        (signal.SIGKILL, ""),  # it had nothing to do with this response, which another worker scores
    ],
)
def test_a_worker_that_somebody_stops_or_kills_costs_its_response_at_most_whatever_its_size(signum, unscored, size):
    pool = RewardPool(EnvConfig(reward=f"{__name__}:hostile", timeout=1.0, num_workers=1))
    try:
        assert answers(pool, "fine") == [0.5]
        (worker,) = pool._all
        os.kill(worker._process.pid, signum)
        assert wait_for(lambda: not is_running(worker._process.pid), 10)
        started = time.monotonic()
        (result,) = asyncio.run(pool.score([RewardRequest("s", "x" * size, "4")]))
        assert result.unscored == unscored
        assert answers(pool, "fine") == [0.5]
        assert time.monotonic() - started < 30
    finally:
        pool.close()


def test_a_worker_killed_before_it_has_read_its_request_costs_that_response():
    pool = RewardPool(EnvConfig(reward=f"{__name__}:hostile", timeout=5.0, num_workers=1))
    try:
        assert answers(pool, "fine") == [0.5]
        (worker,) = pool._all
        os.kill(worker._process.pid, signal.SIGSTOP)
        killer = threading.Timer(0.5, worker._process.kill)
        killer.start()
        (result,) = asyncio.run(pool.score([RewardRequest("s", "read by nobody", "4")]))
        assert result.unscored == "died"
        assert answers(pool, "fine") == [0.5]
    finally:
        pool.close()


def test_a_worker_killed_at_its_start_is_replaced():
    pool = RewardPool(EnvConfig(reward=f"{__name__}:hostile", num_workers=1))
    try:
        pool._all[0]._process.kill()
        assert answers(pool, "fine") == [0.5]
    finally:
        pool.close()


def answers(pool, *texts):
    return [result.reward for result in asyncio.run(pool.score([RewardRequest("s", text, "4") for text in texts]))]


@pytest.mark.parametrize("reward", ["exact_match", f"{__name__}:hostile"])
@pytest.mark.parametrize("calls", [[rows(1, 2)], [rows(1), rows(2)]], ids=["one call", "a call each"])
def test_a_reward_that_raises_on_every_response_ends_the_run_with_what_it_raised(reward, calls):
    kwargs = {"no_such_argument": 1}
    with pytest.raises(UserError, match="raised on each of 4 responses.*TypeError.*no_such_argument"):
        score_calls(EnvConfig(reward=reward, reward_kwargs=kwargs), *calls)


def test_a_row_that_a_reward_cannot_take_ends_no_run():
    """In an asynchronous run each call has one prompt's responses, the malformed row's all raise, and come again."""
    env = EnvConfig(reward=f"{__name__}:hostile")
    results = score_calls(env, rows(1), rows(None), rows(1), rows(2), rows(None), *(rows(n) for n in range(7)))
    assert [result.reward for result in results[0]] == [0.0] * 2 and results[1][0].reward == 0.5
    with pytest.raises(UserError, match="raised on each of 16 responses; on the first: "):
        score_calls(env, rows(None), *(rows(n) for n in range(8)))


def test_hostile_mathematics_does_not_hang():
    env = EnvConfig(reward="math", timeout=2.0)
    texts = [r"\boxed{9^{9^{9^{9^9}}}}", r"\boxed{" * 2000 + "1", "$" * 5000, r"\boxed{\frac{" * 500, "1" * 1_000_000]
    started = time.monotonic()
    assert [result.reward for result in score(env, *texts)] == [0.0] * len(texts)
    assert time.monotonic() - started < 60


def test_a_hanging_worker_does_not_outlive_a_pool_that_was_killed(tmp_path):
    code = (
        "import asyncio, multiprocessing, sys\n"
        "from vespo_megatron.recipe.schema import EnvConfig\n"
        "from vespo_megatron.rewards import RewardPool, RewardRequest\n"
        "if __name__ == '__main__':\n"
        "    pool = RewardPool(EnvConfig(reward='endless:endless', timeout=1.0))\n"
        "    asyncio.run(pool.score([RewardRequest('s', sys.argv[1], '4')]))\n"
    )
    (tmp_path / "endless.py").write_text(
        "import os, pathlib, time\n"
        "def endless(data_source, solution_str, ground_truth, extra_info):\n"
        "    pathlib.Path(solution_str).write_text(str(os.getpid()))\n"
        "    while True: pass\n"
    )
    (tmp_path / "pool.py").write_text(code)
    note = tmp_path / "pid"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    pool = subprocess.Popen([sys.executable, tmp_path / "pool.py", str(note)], env=environment)
    try:
        assert wait_for(lambda: note.exists() and note.read_text(), 60)
    finally:
        pool.kill()
        pool.wait(10)
    worker = int(note.read_text())
    assert wait_for(lambda: not is_running(worker), 20), worker


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "TZX"
    except OSError:
        return False


def test_an_unknown_reward_is_refused_at_once():
    with pytest.raises(UserError, match="env.reward: is 'maths'"):
        RewardPool(EnvConfig(reward="maths"))
    with pytest.raises(UserError, match="cannot be imported"):
        RewardPool(EnvConfig(reward="no.such:thing"))
