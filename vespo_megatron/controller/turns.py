"""The turn loop: a policy and its environment answer each other until one of them ends the response.

What is drawn and what is observed stays as tokens from first to last: each turn's prompt is the prompt and everything
since, as it is. Where an engine answers one call after another (in process), conversations take their turns together;
elsewhere each goes on by itself.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.rows import too_long
from vespo_megatron.data.sample import Sample
from vespo_megatron.data.template import PromptTemplate
from vespo_megatron.environments import EnvironmentPool, Episode, Observation, Turn
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rewards.guarded import NoAnswer
from vespo_megatron.rollout_sglang.conversation import Conversation
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Dialogue:
    """One response, of one turn or of several."""

    result: GenerationResult
    """All turns as one response (`Conversation.result`)."""
    prompt_ids: tuple[int, ...] = ()
    """What the environment began with; empty: the record's prompt."""
    turns: np.ndarray | None = None
    """int64 [R], see `Sample.turns`; None without an environment."""
    rewards: np.ndarray | None = None
    """float64 [turns], the environment's."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """Of `describe_turns`: counts of this response."""
    unscored: str = ""
    """Of `rewards.UNSCORED`, why the environment did not answer; empty when it did."""
    failure: str = ""
    """The exception it raised, for a message."""


class TurnLoop:
    """Draws responses in turns.

    Args:
        generate: how requests are answered.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        environments: EnvironmentPool,
        generate: Callable[[Sequence[GenerationRequest]], Awaitable[list[GenerationResult]]],
    ) -> None:
        self.recipe, self.tokenizer, self.environments, self._generate = recipe, tokenizer, environments, generate
        self.template = PromptTemplate.of(recipe, tokenizer)

    async def draw(self, requests: Sequence[GenerationRequest], records: Sequence[PromptRecord]) -> list[Dialogue]:
        """Responses in the order of `requests`, whose prompts are those of `records` until an environment has another.

        Raises:
            UserError: the engine failed, the chat template does not take what an environment says, or the environment
                raises on everything.
        """
        pairs = list(zip(requests, records, strict=True))
        if self.recipe.policy.generation.backend == "in_process":
            size = self.environments.limit or max(1, len(pairs))
            found = [await self._together(pairs[start : start + size]) for start in range(0, len(pairs), size)]
        else:
            found = await asyncio.gather(*(self._together([pair]) for pair in pairs))
        dialogues = [dialogue for some in found for dialogue in some]
        self.environments.note([record.prompt_id for record in records], [each.failure for each in dialogues])
        return dialogues

    async def _together(self, pairs: Sequence[tuple[GenerationRequest, PromptRecord]]) -> list[Dialogue]:
        async with self.environments.episodes(len(pairs)) as episodes:
            talks = [
                _Talk(self, request, record, episode)
                for (request, record), episode in zip(pairs, episodes, strict=True)
            ]
            await asyncio.gather(*(talk.begin() for talk in talks))
            while asked := [(talk, request) for talk in talks if (request := talk.next_request()) is not None]:
                results = await self._generate([request for _, request in asked])
                await asyncio.gather(*(talk.go_on(result) for (talk, _), result in zip(asked, results, strict=True)))
            return [talk.dialogue() for talk in talks]

    def ids(self, observation: Observation, turn_ids: Sequence[int]) -> list[int]:
        """What an observation adds behind a turn. Raises `UserError` as `PromptTemplate.after_turn`."""
        if isinstance(observation, str):
            return self.template.text(observation)
        return _token_ids(observation) or self.template.after_turn(list(observation), turn_ids)  # type: ignore[arg-type]

    def prompt(self, observation: Observation | None, record: PromptRecord) -> tuple[int, ...]:
        """What an episode begins with.

        Raises:
            UserError: it is empty, or longer than `data.max_input_seq_length`.
        """
        if observation is None:
            return tuple(record.prompt_ids)
        whole = observation if isinstance(observation, str) else list(observation)
        ids = _token_ids(observation) or self.template.one(whole)  # type: ignore[arg-type]
        if len(ids) > self.recipe.data.max_input_seq_length:
            raise too_long(len(ids), self.recipe.data.max_input_seq_length, f"env.class, {record.prompt_id}")
        return tuple(ids)


def _token_ids(observation: Observation) -> list[int]:
    """As they are; empty where it is something else."""
    if isinstance(observation, str) or not all(isinstance(token, (int, np.integer)) for token in observation):
        return []
    return [int(token) for token in observation]  # type: ignore[arg-type]


class _Talk:
    """One response on its way."""

    def __init__(self, loop: TurnLoop, request: GenerationRequest, record: PromptRecord, episode: Episode) -> None:
        self.loop, self.record, self.episode, self._asked = loop, record, episode, request
        self._begin(tuple(record.prompt_ids))
        self._rewards: list[float] = []
        self._over, self._cut = False, False
        self._tool_errors = self._truncated_turns = 0
        self._why = NoAnswer("")

    def _begin(self, prompt_ids: tuple[int, ...]) -> None:
        self.conversation = Conversation(
            replace(self._asked, prompt_ids=prompt_ids),
            context_length=self.loop.recipe.policy.max_total_sequence_length,
            max_tokens_per_turn=self.loop.recipe.env.max_tokens_per_turn,
        )

    async def begin(self) -> None:
        """The environment's `reset`."""
        try:
            self._begin(self.loop.prompt(await self.episode.reset(self.record), self.record))
        except NoAnswer as why:
            self._why, self._over = why, True

    def next_request(self) -> GenerationRequest | None:
        """What is to be drawn next; None when it is over."""
        request = None if self._over else self.conversation.next_request()
        if request is None or not self._rewards:
            return request
        return replace(request, seed=request_seed(self.loop.recipe.grpo.seed, request.request_id))

    async def go_on(self, result: GenerationResult) -> None:
        """A turn was drawn: the environment's `step`, unless no stop token has ended it."""
        number = len(self._rewards)
        self.conversation.add(result)
        self._rewards.append(0.0)
        if result.finish_reason != "stop":
            self._over, self._truncated_turns = True, 1
            return
        ids = tuple(result.output_ids.tolist())
        text = str(self.loop.tokenizer.decode(result.output_ids, skip_special_tokens=True))
        try:
            step = await self.episode.step(Turn(number, ids, text))
        except NoAnswer as why:
            self._why, self._over = why, True
            return
        self._rewards[number] = step.reward
        self._tool_errors += step.tool_errors
        if step.done:
            self._over = True
            return
        observed = self.loop.ids(step.observation, ids) if len(step.observation) else []
        last = number + 1 >= self.loop.recipe.grpo.max_rollout_turns
        if last or not observed or not self.conversation.has_room(len(observed)):
            self._over, self._cut = True, True
        else:
            self.conversation.observe(observed)

    def dialogue(self) -> Dialogue:
        """As it has ended."""
        if self._rewards:
            result = self.conversation.result()
        else:  # the environment had not even begun
            nothing = np.zeros(0)
            result = GenerationResult(self._asked.request_id, nothing, nothing, nothing, "abort")
        if self._cut:
            result.finish_reason = "length"
        return Dialogue(
            result=result,
            prompt_ids=self.conversation.request.prompt_ids,
            turns=self.conversation.turns(),
            rewards=np.array(self._rewards, dtype=np.float64),
            facts={
                "tool_errors": float(self._tool_errors),
                "truncated_turns": float(self._truncated_turns),
                "ended_by_limit": float(self._cut),
            },
            unscored=self._why.kind,
            failure=self._why.failure,
        )


def describe_turns(samples: Sequence[Sample]) -> dict[str, float]:
    """Metrics of responses in turns; none where there are none."""
    if not samples:
        return {}
    turns = np.array([0 if sample.turn_rewards is None else len(sample.turn_rewards) for sample in samples])
    drawn = sum(int(sample.drawn.sum()) for sample in samples)
    total = sum(len(sample.response_ids) for sample in samples)
    facts = {
        name: sum(sample.turn_facts.get(name, 0.0) for sample in samples)
        for name in ("tool_errors", "truncated_turns", "ended_by_limit")
    }
    return {
        "turns/mean": float(turns.mean()),
        "turns/max": float(turns.max()),
        "turns/tokens_mean": drawn / max(1, turns.sum()),
        "turns/observed_tokens_mean": (total - drawn) / len(samples),
        "turns/truncated_fraction": facts["truncated_turns"] / max(1, turns.sum()),
        "turns/limit_fraction": facts["ended_by_limit"] / len(samples),
        "turns/tool_errors": facts["tool_errors"],
    }


def request_seed(seed: int, name: str) -> int:
    """A seed of its own for every response and turn, the same in every run with the same recipe."""
    return zlib.crc32(f"{seed}/{name}".encode())
