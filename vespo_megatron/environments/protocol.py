"""What an environment is: `reset` begins an episode, `step` answers a turn; token ids in, token ids or messages out."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from vespo_megatron.data.prompt_set import PromptRecord

Observation = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Chat messages, which go through the recipe's chat template as what follows the turn; token ids, which are taken as
they are; or a text, which is tokenised as it is, without a template."""


@dataclass(frozen=True)
class Turn:
    """What the policy drew in one turn."""

    number: int
    """From 0."""
    token_ids: tuple[int, ...]
    """The stop token that ended it included."""
    text: str
    """The same without special tokens."""


class Step(NamedTuple):
    """What an environment answers. A plain (observation, reward, done) is one too."""

    observation: Observation
    """What the policy reads next; not looked at when it is done."""
    reward: float = 0.0
    """Of this turn. The response's reward is the sum over its turns, and the score of `env.reward`."""
    done: bool = False
    tool_errors: int = 0
    """Calls in this turn that failed or could not be read; counted."""


class Environment(Protocol):
    """One episode at a time; `reset` begins the next. Made with `env.options` as keyword arguments.

    Either method may be a coroutine function. What they raise costs its response alone (`env.on_unscored`), and ends
    the run where they raise on everything.
    """

    def reset(self, record: PromptRecord) -> Observation | Awaitable[Observation | None] | None:
        """The prompt of an episode: messages or token ids; None: the record's own."""

    def step(self, turn: Turn) -> Step | tuple | Awaitable[Step | tuple]:
        """The answer to a turn that a stop token has ended."""
