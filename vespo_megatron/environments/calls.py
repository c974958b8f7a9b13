"""One call of an environment, wherever it runs: its answer checked, or why there is none."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

from vespo_megatron.environments.protocol import Environment, Step
from vespo_megatron.environments.registry import make
from vespo_megatron.rewards.guarded import ERROR, TIMEOUT, NoAnswer

Request = tuple[Literal["reset", "step"], Any]
"""Method and its argument: a `PromptRecord` or a `Turn`."""
Answer = tuple[Any, str]
"""What it returned, and the exception it raised instead; empty when it answered."""


async def answer(environment: Environment, request: Request) -> Answer:
    """What a call returns or raises; the checks of a step's form are part of the call."""
    try:
        found = getattr(environment, request[0])(request[1])
        found = await found if inspect.isawaitable(found) else found
        return (found if request[0] == "reset" else _step(found)), ""
    except Exception as error:  # one episode must not end the run
        return None, f"{type(error).__name__}: {error}"


async def answer_within(environment: Environment, request: Request, seconds: float) -> Any:
    """In this process: a coroutine that is late is cancelled, plain code cannot be.

    Raises:
        NoAnswer: late, or it raised.
    """
    try:
        return value_of(await asyncio.wait_for(answer(environment, request), seconds))
    except TimeoutError:
        raise NoAnswer(TIMEOUT) from None


def value_of(found: Answer) -> Any:
    """Raises `NoAnswer` where an exception came instead."""
    if found[1]:
        raise NoAnswer(ERROR, found[1])
    return found[0]


def answerer(name: str, options: dict[str, Any]) -> Callable[[Request], Answer]:
    """For a process of its own: one environment, and one event loop for all of its calls."""
    environment, loop = make(name, options), asyncio.new_event_loop()
    return lambda request: loop.run_until_complete(answer(environment, request))


def _step(found: Any) -> Step:
    step = Step(*found)
    if isinstance(step.reward, bool) or not math.isfinite(step.reward):
        raise ValueError(f"the reward of a turn is {step.reward!r}, and no finite number")
    return step._replace(reward=float(step.reward), done=bool(step.done), tool_errors=int(step.tool_errors))
