"""Scoring under a deadline: rewards run in worker processes that are ended and replaced when one takes too long."""

from __future__ import annotations

import asyncio
import math
import queue
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards import functions
from vespo_megatron.rewards.guarded import FAILURES, GuardedProcess, NoAnswer
from vespo_megatron.rewards.mistakes import Mistakes

UNSCORED = FAILURES
"""Why a score does not come: late, the function raised, or the process ended with it."""


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
        self._mistakes = Mistakes(" + ".join(sorted(functions.names_of(env, choices))))
        self._workers: queue.SimpleQueue[GuardedProcess] = queue.SimpleQueue()
        self._all: list[GuardedProcess] = []
        self._threads: ThreadPoolExecutor | None = None
        if not functions.is_inline(env, choices):
            self._threads = ThreadPoolExecutor(max_workers=env.num_workers, thread_name_prefix="reward")
            name = f"reward {' + '.join(sorted(functions.names_of(env)))}"
            self._all = [GuardedProcess(_scorer, (env,), env.timeout, name) for _ in range(env.num_workers)]
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
            return worker.call(request)
        except NoAnswer as why:
            return RewardResult(0.0, unscored=why.kind)
        finally:
            self._workers.put(worker)

    def close(self) -> None:
        """End the workers; idempotent."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.close()


def _scorer(env: EnvConfig) -> Callable[[RewardRequest], RewardResult]:
    return partial(_score, functions.of_recipe(env))


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
