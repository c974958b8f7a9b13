"""Scoring under a deadline: rewards run in worker processes that are ended and replaced when one takes too long.

Math-Verify can hang on hostile expressions, and so can anybody's own function; no thread or signal stops them all.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import queue
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards import functions

_START_TIMEOUT = 120.0
"""Seconds a worker has to import its reward."""
_ORPHAN_GRACE = 2.0
"""Seconds after the deadline at which a worker that nobody has ended ends itself."""


@dataclass(frozen=True)
class RewardRequest:
    """One response to score."""

    data_source: str
    solution_str: str
    ground_truth: Any
    extra_info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardResult:
    """Its score, and what it is made of; `timeout` and `error` among the parts mark a score of 0 that is not earned."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    """The exception the function raised, for a message; empty when it answered."""


class RewardPool:
    """Scores responses in `env.num_workers` processes, each score within `env.timeout` seconds."""

    def __init__(self, env: EnvConfig) -> None:
        self._function = functions.of_recipe(env)  # a wrong name fails here, not in a worker
        self.fence = functions.fence(env)
        """What programs of responses are fenced by; None where the reward runs none."""
        self._env, self._name = env, " + ".join(env.rewards) or env.reward
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all: list[_Worker] = []
        self._threads: ThreadPoolExecutor | None = None
        if not set(env.rewards or [env.reward]) <= functions.INLINE:
            self._threads = ThreadPoolExecutor(max_workers=env.num_workers, thread_name_prefix="reward")
            self._all = [_Worker(env) for _ in range(env.num_workers)]
            for worker in self._all:
                self._workers.put(worker)

    async def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """Results in the order of `requests`.

        Raises:
            UserError: a worker cannot even start, or the function raised on every one of several requests: that is a
                mistake in it, and a run whose rewards are all 0 would not say so.
        """
        if self._threads is None:
            results = [_score(self._function, request) for request in requests]
        else:
            loop = asyncio.get_running_loop()
            scores = (loop.run_in_executor(self._threads, self._one, request) for request in requests)
            results = list(await asyncio.gather(*scores))
        if len(results) > 1 and all(result.failure for result in results):
            raise UserError(
                f"{self._name} raised on each of {len(results)} responses; on the first: {results[0].failure}",
                where="env.reward",
                fix="mend the function, or env.reward_kwargs",
            )
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
        self._process = self._context.Process(target=_serve, args=(theirs, self._env), daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False

    def score(self, request: RewardRequest, timeout: float) -> RewardResult:
        if not self._ready:
            if not self._connection.poll(_START_TIMEOUT):
                raise UserError(
                    f"did not start within {_START_TIMEOUT:.0f} s",
                    where=f"reward {self._env.rewards or self._env.reward}",
                )
            try:
                self._connection.recv()
            except EOFError:
                raise UserError(
                    "ended at once",
                    where=f"reward {self._env.rewards or self._env.reward}",
                    fix="run the function by hand",
                ) from None
            self._ready = True
        try:
            self._connection.send(request)
            if self._connection.poll(timeout):
                return self._connection.recv()
            outcome = "timeout"
        except (EOFError, BrokenPipeError):
            outcome = "error"  # the process died of it
        self.close()
        self._start()
        return RewardResult(0.0, {outcome: 1.0})

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join(5)


def _serve(connection: Connection, env: EnvConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    function = functions.of_recipe(env)
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        # The kernel ends a score that hangs even when the pool that would is gone.
        signal.setitimer(signal.ITIMER_REAL, env.timeout + _ORPHAN_GRACE)
        result = _score(function, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(result)


def _score(function: functions.RewardFunction, request: RewardRequest) -> RewardResult:
    try:
        answer = function(request.data_source, request.solution_str, request.ground_truth, dict(request.extra_info))
        parts = {}
        if isinstance(answer, Mapping):
            parts = {key: float(value) for key, value in answer.items() if key != "score" and _is_number(value)}
            answer = answer["score"]
        return RewardResult(float(answer), parts)
    except Exception as error:  # one score must not end the run; the part says so in the metrics
        return RewardResult(0.0, {"error": 1.0}, failure=f"{type(error).__name__}: {error}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
