"""A judge by URL, against a small server of chat completions on this machine."""

from __future__ import annotations

import asyncio
import threading

import pytest
from aiohttp import web
from scoring import score

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards.judge import judge_reward


class Judge:
    """Answers from a list: a status, a text, or a body; `wait` seconds late."""

    def __init__(self):
        self.answers, self.seen, self.headers, self.wait = [], [], [], 0.0

    async def answer(self, request):
        self.seen.append(await request.json())
        self.headers.append(dict(request.headers))
        await asyncio.sleep(self.wait)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, int):
            return web.Response(status=answer)
        if isinstance(answer, dict):
            return web.json_response(answer)
        return web.json_response({"choices": [{"message": {"role": "assistant", "content": answer}}]})


@pytest.fixture
def judge():
    made, ready, loop = Judge(), threading.Event(), asyncio.new_event_loop()

    async def start():
        application = web.Application()
        application.router.add_post("/v1/chat/completions", made.answer)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=0.1)
        await site.start()
        made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()
        return runner

    def serve():
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(20)
    yield made
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def ask(judge, **arguments):
    return judge_reward("s", "It is 4.", "4", {"level": "easy"}, url=judge.url, model="m", backoff=0.01, **arguments)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 0.7),
        ("It is right: 10", 1.0),
        ("<think>surely 3</think> 2.5", 0.25),
        ("Of 10 points: 0.", 0.0),
        ("8/10 → 9", 0.9),
    ],
)
def test_the_last_number_of_its_answer_counts(judge, text, value):
    judge.answers = [text]
    assert ask(judge) == pytest.approx(value)


def test_it_is_asked_with_response_reference_and_what_the_row_says(judge):
    judge.answers = ["3"]
    value = ask(
        judge,
        prompt="$level: is «$solution» «$ground_truth»? $$ $unknown 0-$best",
        system="You judge.",
        best=5.0,
        max_tokens=9,
    )
    assert value == pytest.approx(0.6)
    assert judge.seen == [
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "You judge."},
                {"role": "user", "content": "easy: is «It is 4.» «4»? $ $unknown 0-5"},
            ],
            "max_tokens": 9,
            "temperature": 0.0,
        }
    ]


def test_a_response_cannot_put_the_reference_into_the_question(judge):
    judge.answers = ["1"]
    judge_reward("s", "$ground_truth", "secret", {}, url=judge.url, model="m", prompt="$solution", backoff=0.01)
    assert judge.seen[0]["messages"][0]["content"] == "$ground_truth"


@pytest.mark.parametrize("answer", ["no number", "11", "-1", "", {"choices": []}, {"error": "x"}, "<think>10"])
def test_an_answer_without_a_number_in_range_is_no_score(judge, answer):
    judge.answers = [answer]
    with pytest.raises(UserError, match="expected: (a number from 0 to 10|a chat completion)"):
        ask(judge)


def test_a_busy_judge_is_asked_again_and_a_broken_one_is_an_error(judge):
    judge.answers = [429, 503, "6"]
    assert ask(judge) == pytest.approx(0.6) and len(judge.seen) == 3
    judge.answers = [500]
    with pytest.raises(Exception, match="500"):
        ask(judge, retries=2)
    judge.answers = [404]
    with pytest.raises(Exception, match="404"):
        ask(judge)


def test_a_key_is_taken_from_the_environment_and_never_from_the_recipe(judge, monkeypatch):
    judge.answers = ["6"]
    ask(judge)
    monkeypatch.setenv("JUDGE_KEY", "k")
    ask(judge, api_key_variable="JUDGE_KEY")
    assert "Authorization" not in judge.headers[0] and judge.headers[1]["Authorization"] == "Bearer k"
    with pytest.raises(UserError, match="environment variable NO_KEY: is not set"):
        ask(judge, api_key_variable="NO_KEY")


def test_as_a_run_s_reward_late_and_senseless_answers_are_told_apart(judge):
    def scored(**settings):
        arguments = {"url": judge.url, "model": "m", "backoff": 0.01, "retries": 1}
        (first, second) = score(EnvConfig(reward="judge", reward_kwargs=arguments, **settings), "a", "b")
        return [(each.reward, each.unscored) for each in (first, second)]

    judge.answers = ["10", "no idea"]
    assert scored(timeout=20.0) == [(1.0, ""), (0.0, "error")]
    judge.answers, judge.wait = ["10"], 30.0
    assert scored(timeout=1.0) == [(0.0, "timeout")] * 2
