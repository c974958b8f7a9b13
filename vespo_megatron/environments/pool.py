"""Environments that are alive: each in a guarded process of its own, or plain ones in this process.

A process holds one environment and answers for one episode at a time; at the episode's end it goes to the next. One
that is late or dies costs its own episode alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.environments.calls import Request, answer_within, answerer, value_of
from vespo_megatron.environments.protocol import Environment, Observation, Step, Turn
from vespo_megatron.environments.registry import check, make
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards.guarded import GuardedProcess
from vespo_megatron.rewards.mistakes import Mistakes


class Episode:
    """One response's environment, from `EnvironmentPool.episodes`. Its calls raise `rewards.guarded.NoAnswer`."""

    def __init__(self, pool: EnvironmentPool, host: GuardedProcess | Environment) -> None:
        self._pool, self.host = pool, host
        self.pending: Future | None = None

    async def reset(self, record: PromptRecord) -> Observation | None:
        """See `Environment.reset`."""
        return await self._call(("reset", record))

    async def step(self, turn: Turn) -> Step:
        """See `Environment.step`."""
        return await self._call(("step", turn))

    async def _call(self, request: Request) -> Any:
        if self._pool.threads is None or not isinstance(self.host, GuardedProcess):
            return await answer_within(self.host, request, self._pool.timeout)  # type: ignore[arg-type]
        self.pending = self._pool.threads.submit(self.host.call, request)
        return value_of(await asyncio.wrap_future(self.pending))


class EnvironmentPool:
    """The environments of a run, or of an evaluation; used in one event loop.

    Raises:
        UserError: see `registry.check`.
    """

    def __init__(self, env: EnvConfig) -> None:
        assert env.environment is not None
        self.fence = check(env)
        """What programs are fenced by; None where none are run."""
        self.timeout, self.limit = env.turn_timeout, env.num_environments
        self._name, self._options = env.environment, dict(env.options)
        self._mistakes = Mistakes(self._name, "env.class")
        self._free: list[GuardedProcess | Environment] = []
        self._made: list[GuardedProcess] = []
        self._alive = 0
        self._changed, self._turnstile = asyncio.Condition(), asyncio.Lock()
        self.threads: ThreadPoolExecutor | None = None
        if self.limit:
            self.threads = ThreadPoolExecutor(max_workers=self.limit, thread_name_prefix="environment")

    @asynccontextmanager
    async def episodes(self, count: int) -> AsyncIterator[list[Episode]]:
        """`count` of them, at most `limit` where there is one; waits until so many are free.

        Who has begun to take is served first, or two that each have half of what they need would wait for ever.
        """
        async with self._turnstile:
            async with self._changed:
                await self._changed.wait_for(lambda: not self.limit or self._alive + count <= self.limit)
                self._alive += count
            taken = [Episode(self, self._take()) for _ in range(count)]
        try:
            yield taken
        finally:
            late = [each.pending for each in taken if each.pending is not None and not each.pending.done()]
            if late:  # given up in the middle of a call: its process is nobody else's until that has ended
                await asyncio.shield(asyncio.gather(*map(asyncio.wrap_future, late), return_exceptions=True))
            async with self._changed:
                self._free += [each.host for each in taken]
                self._alive -= count
                self._changed.notify_all()

    def _take(self) -> GuardedProcess | Environment:
        if self._free:
            return self._free.pop()
        name = f"environment {self._name}"
        if not self.limit:
            try:
                return make(self._name, self._options)
            except Exception as error:
                raise UserError(f"raised when it was made: {type(error).__name__}: {error}", where=name) from error
        self._made.append(GuardedProcess(answerer, (self._name, self._options), self.timeout, name))
        return self._made[-1]

    def note(self, rows: Sequence[str], failures: Sequence[str]) -> None:
        """What episodes raised, of which rows of the data. Raises `UserError` as `Mistakes.note`."""
        self._mistakes.note(rows, failures)

    def close(self) -> None:
        """End the processes; idempotent."""
        if self.threads is not None:
            self.threads.shutdown(wait=False, cancel_futures=True)
        for each in self._made:
            each.close()
