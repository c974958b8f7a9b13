"""Scoring under a deadline: rewards run in worker processes that are ended and replaced when one takes too long.

Math-Verify can hang on hostile expressions, and so can anybody's own function; no thread or signal stops them all.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import queue
import signal
import socket
import struct
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards import functions
from vespo_megatron.rewards.mistakes import Mistakes

UNSCORED = ("timeout", "error", "died")
"""Why a score does not come: late, the function raised, or the process ended with it."""
_START_TIMEOUT = 120.0
"""Seconds a worker has to import its reward."""
_STARTS = 3
"""Attempts to start a worker that ends before it is ready."""
_ORPHAN_GRACE = 2.0
"""Seconds after the deadline at which a worker that nobody has ended ends itself."""


@dataclass(frozen=True)
class RewardRequest:
    """One response to score."""

    data_source: str
    solution_str: str
    ground_truth: Any
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    row: str = ""
    """Names the row of the data that was answered, the same in every response to it."""
    reward: str = ""
    """The reward of its set (`SetConfig.reward_choice`); empty: the recipe's."""


@dataclass(frozen=True)
class RewardResult:
    """Its score, and what it is made of."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    unscored: str = ""
    """Of `UNSCORED`, why no score came; the reward is 0 then, and not earned. Empty when one came."""
    failure: str = ""
    """The exception the function raised, for a message; empty when it answered."""


class RewardPool:
    """Scores responses in `env.num_workers` processes, each score within `env.timeout` seconds.

    Args:
        choices: rewards of single sets (`SetConfig.reward_choice`).

    Raises:
        UserError: there is no such reward, or nothing that fences programs.
    """

    def __init__(self, env: EnvConfig, choices: Collection[str] = ()) -> None:
        self._function = functions.of_recipe(env)  # a wrong name fails here, not in a worker
        for choice in choices:
            functions.chosen(choice)
        self.fence = functions.fence(env, choices)
        """What programs of responses are fenced by; None where the reward runs none."""
        self._env, self._mistakes = env, Mistakes(" + ".join(sorted(functions.names_of(env, choices))))
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all: list[_Worker] = []
        self._threads: ThreadPoolExecutor | None = None
        if not functions.is_inline(env, choices):
            self._threads = ThreadPoolExecutor(max_workers=env.num_workers, thread_name_prefix="reward")
            self._all = [_Worker(env) for _ in range(env.num_workers)]
            for worker in self._all:
                self._workers.put(worker)

    async def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """Results in the order of `requests`.

        Raises:
            UserError: a worker cannot even start, or the function raises on everything (`Mistakes`).
        """
        if self._threads is None:
            results = [_score(self._function, request) for request in requests]
        else:
            loop = asyncio.get_running_loop()
            scores = (loop.run_in_executor(self._threads, self._one, request) for request in requests)
            results = list(await asyncio.gather(*scores))
        self._mistakes.note([request.row for request in requests], [result.failure for result in results])
        return results

    def _one(self, request: RewardRequest) -> RewardResult:
        worker = self._workers.get()
        try:
            return worker.score(request, self._env.timeout)
        finally:
            self._workers.put(worker)

    def close(self) -> None:
        """End the workers; idempotent."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.close()


class _Worker:
    """A process that scores one request at a time."""

    def __init__(self, env: EnvConfig) -> None:
        self._env = env
        # Forked from a server that has imported what is slow: replacing a worker takes milliseconds, not seconds.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["vespo_megatron.rewards.preload"])
        self._ready = False
        self._start()

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        _set_deadline(self._connection, self._env.timeout)
        self._process = self._context.Process(target=_serve, args=(theirs, self._env), daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False

    def score(self, request: RewardRequest, timeout: float) -> RewardResult:
        self._await_start()
        try:
            self._connection.send(request)
            if self._connection.poll(timeout):
                return self._connection.recv()
            outcome = "timeout"
        except BlockingIOError:
            outcome = "timeout"  # it takes nothing more, or says nothing more
        except (EOFError, OSError):
            outcome = "died"
        self._restart()
        return RewardResult(0.0, unscored=outcome)

    def _await_start(self) -> None:
        """Until it has its function. One that was killed is replaced: only a function that ends all is a mistake."""
        for _ in range(_STARTS):
            if self._ready and self._connection.poll():  # while it had nothing to do, it has ended
                self._restart()
            if self._ready:
                return
            if not self._connection.poll(_START_TIMEOUT):
                raise UserError(
                    f"did not start within {_START_TIMEOUT:.0f} s",
                    where=f"reward {' + '.join(sorted(functions.names_of(self._env)))}",
                )
            try:
                self._connection.recv()
                self._ready = True
            except (EOFError, OSError):
                self._restart()
        if not self._ready:
            raise UserError(
                f"ended at once, {_STARTS} times",
                where=f"reward {' + '.join(sorted(functions.names_of(self._env)))}",
                fix="run the function by hand",
            )

    def _restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join(5)


def _set_deadline(connection: Connection, seconds: float) -> None:
    """A process that is stopped takes or gives no more than fits into the pipe: neither end waits for ever."""
    deadline = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6) or 1)
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, deadline)


def _serve(connection: Connection, env: EnvConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    function = functions.of_recipe(env)
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):  # the pool has ended, or was killed
            return
        # The kernel ends a score that hangs even when the pool that would is gone.
        signal.setitimer(signal.ITIMER_REAL, env.timeout + _ORPHAN_GRACE)
        result = _score(function, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        with suppress(OSError):
            connection.send(result)


def _score(function: functions.RewardFunction, request: RewardRequest) -> RewardResult:
    try:
        function = functions.chosen(request.reward) if request.reward else function
        answer = function(request.data_source, request.solution_str, request.ground_truth, dict(request.extra_info))
        parts = {}
        if isinstance(answer, Mapping):
            parts = {key: float(value) for key, value in answer.items() if key != "score" and _is_number(value)}
            answer = answer["score"]
        return RewardResult(float(answer), parts)
    except Exception as error:  # one score must not end the run, unless env.on_unscored says so
        return RewardResult(0.0, unscored="error", failure=f"{type(error).__name__}: {error}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
