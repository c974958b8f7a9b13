"""Code, format, remote and weighted rewards, and the punishment of length."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from scoring import score
from wall import needs_wall

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import EnvConfig, RewardShapingConfig
from vespo_megatron.rewards import RewardPool
from vespo_megatron.rewards.code import code_reward
from vespo_megatron.rewards.format import format_reward
from vespo_megatron.rewards.remote import remote_reward
from vespo_megatron.rewards.sandbox import Limits, run
from vespo_megatron.rewards.shaping import overlong_penalty
from vespo_megatron.rewards.wall import FOLDER, find_wall

ADDS = "Here:\n```python\na, b = map(int, input().split())\nprint(a + b)\n```\nDone."
FUNCTION = "```python\ndef add(a, b):\n    return a + b\n```"


def code(program, truth, **arguments):
    return code_reward("apps", program, truth, {}, **arguments)["score"]


def fenced(program):
    return f"```python\n{program}\n```"


@needs_wall
def test_programs_functions_and_statements_are_told_right_from_wrong():
    reads = {"inputs": ["1 2\n", "30 4\n"], "outputs": ["3\n", "34"]}
    assert code(ADDS, json.dumps(reads)) == 1.0
    assert code(ADDS, reads | {"outputs": ["3", "35"]}) == 0.0
    assert code(ADDS, reads | {"outputs": ["3", "35"]}, partial=True) == 0.5
    calls = {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}
    assert code(FUNCTION, calls) == 1.0
    assert code(FUNCTION, calls | {"outputs": [4]}) == 0.0
    assert code("```python\nclass Solution:\n    def add(self, a, b):\n        return a + b\n```", calls) == 1.0
    assert code(FUNCTION, ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]) == 1.0
    assert code(FUNCTION, "def check(f):\n    assert f(2, 2) == 5\ncheck(add)") == 0.0
    assert code("no program", reads) == 0.0


@needs_wall
def test_a_program_that_leaves_before_the_statements_has_not_passed():
    assert code(fenced("import sys\ndef add(a, b):\n    return 0\nsys.exit(0)"), ["assert add(1, 2) == 3"]) == 0.0
    assert code(fenced("import os\nos._exit(0)"), ["assert False"]) == 0.0


def programs():
    """Programs that still run, whatever session or parent they have, given a moment to end."""
    deadline = time.monotonic() + 2
    while True:
        commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        found = [command for command in commands if "/program.py" in command]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


@needs_wall
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "x = []\nwhile True: x.append(bytearray(10 ** 7))",
        "while True: print('x' * 10 ** 6)",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(12.345)\ntime.sleep(60)",
        "import socket; socket.create_connection(('127.0.0.1', {port}), 2).send(b'x'); print(3)",
    ],
    ids=["spins", "sleeps", "memory", "output", "forks", "network"],
)
def test_a_hostile_program_scores_nothing_in_time_and_reaches_no_network(program):
    listener = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    try:
        started = time.monotonic()
        text = fenced(program.replace("{port}", str(listener.server_port)))
        assert code(text, {"inputs": [""], "outputs": ["3"]}, test_timeout=1.0) == 0.0
        assert time.monotonic() - started < 10
        assert not programs()
    finally:
        listener.server_close()


@needs_wall
def test_a_program_sees_nothing_of_this_process():
    os.environ["A_SECRET_OF_THE_RUN"] = "token"
    try:
        program = "import os; print(os.environ.get('A_SECRET_OF_THE_RUN'), os.listdir('.'))"
        ended = run(program, "", Limits(5.0, 512), find_wall())
    finally:
        del os.environ["A_SECRET_OF_THE_RUN"]
    place = Path(sys.prefix)  # where the interpreter is below the working folder, its way there is seen
    way = [place.relative_to(FOLDER).parts[0]] if place.is_relative_to(FOLDER) else []
    assert (ended.status, ended.printed) == (0, f"None {way}\n")


@needs_wall
def test_tests_of_no_known_form_are_refused():
    with pytest.raises(UserError, match="are no tests"):
        code(ADDS, {"cases": []})


def test_format_wants_the_whole_pattern_and_its_marks_once():
    def score(text, **arguments):
        return format_reward("s", text, "", {}, **arguments)

    assert score(r"so \boxed{4}") == 1.0 and score("4") == 0.0
    think = {"pattern": r"(?s)<think>.*</think>.*", "once": ["<think>", "</think>"]}
    assert score("<think>a</think> 4", **think) == 1.0
    assert score("<think>a</think> 4</think>", **think) == 0.0
    with pytest.raises(UserError, match="no regular expression"):
        score("x", pattern="(")


@pytest.fixture
def service():
    """A reward service that answers from a list: a status, or a score."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.seen.append(sent)
            answer = self.server.answers.pop(0)
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.seen = [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


def remote(server, **arguments):
    url = f"http://127.0.0.1:{server.server_port}/"
    return remote_reward("s", "text", "4", {"index": 1}, url=url, backoff=0.01, **arguments)


def test_a_busy_service_is_asked_again_and_a_broken_one_is_an_error(service):
    service.answers = [503, 500, {"score": 0.5, "style": 1.0}]
    assert remote(service) == {"score": 0.5, "style": 1.0}
    wanted = {"data_source": "s", "solution_str": "text", "ground_truth": "4", "extra_info": {"index": 1}}
    assert service.seen == [wanted] * 3
    service.answers = [404]
    with pytest.raises(Exception, match="404"):
        remote(service)
    service.answers = ["a text"]
    with pytest.raises(UserError, match="remote reward: answered 'a text'"):
        remote(service)
    service.answers = [500] * 9
    with pytest.raises(Exception, match="500"):
        remote(service, retries=2)


def test_a_weighted_sum_logs_its_parts():
    env = EnvConfig(
        rewards={"exact_match": 1.0, "format": 0.25},
        reward_kwargs={"format": {"pattern": r".*!"}},
    )
    right, polite = score(env, r"\boxed{4}", r"\boxed{5}!")
    assert (right.reward, dict(right.parts)) == (1.0, {"exact_match": 1.0, "format": 0.0})
    assert (polite.reward, dict(polite.parts)) == (0.25, {"exact_match": 0.0, "format": 1.0})
    with pytest.raises(UserError, match="arguments for math"):
        RewardPool(EnvConfig(rewards={"exact_match": 1.0}, reward_kwargs={"math": {}}))


@needs_wall
def test_a_weighted_sum_with_code_runs_in_workers():
    env = EnvConfig(rewards={"code": 1.0, "format": 0.5}, reward_kwargs={"format": {"pattern": r"(?s).*Done\."}})
    (result,) = score(env, ADDS, truth={"inputs": ["1 2"], "outputs": ["3"]})
    assert result.reward == 1.5
    assert dict(result.parts) == {"code": 1.0, "code_passed": 1.0, "code_no_program": 0.0, "format": 1.0}


def test_the_last_tokens_before_the_limit_cost_ever_more():
    config = RewardShapingConfig(enabled=True, overlong_buffer_length=20, overlong_buffer_penalty=2.0)
    found = [overlong_penalty(length, config, 100) for length in (1, 80, 85, 90, 100, 120)]
    assert found == [0.0, 0.0, -0.5, -1.0, -2.0, -2.0]
    assert overlong_penalty(50, RewardShapingConfig(overlong_buffer_length=20, max_response_length=50), 100) == -1.0
