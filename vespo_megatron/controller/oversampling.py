"""Groups begun side by side, of which the first whole ones are taken; the rest is ended with the tokens it has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vespo_megatron.controller.turns import request_seed
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.rollout_sglang.conversation import Conversation
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult, RolloutEngine, SamplingParams
from vespo_megatron.rollout_sglang.faults import WeightsNeeded


@dataclass(eq=False)
class BegunGroup:
    """All responses to one prompt, some of them perhaps in their middle."""

    record: PromptRecord
    conversations: list[Conversation]

    @property
    def whole(self) -> bool:
        """Whether every response has come to its end."""
        return all(each.next_request() is None for each in self.conversations)

    @property
    def tokens(self) -> int:
        """Drawn so far."""
        return sum(int(each.loss_mask().sum()) for each in self.conversations)

    def state_dict(self) -> dict[str, Any]:
        """Of types that `torch.load` trusts."""
        return {
            "prompt_id": self.record.prompt_id,
            "responses": [
                {"request_id": each.request.request_id, "seed": each.request.seed} | _with_tensors(each.state_dict())
                for each in self.conversations
            ],
        }

    @classmethod
    def of_state(
        cls, state: Mapping[str, Any], record: PromptRecord, sampling: SamplingParams, context_length: int
    ) -> BegunGroup:
        """The group that `state` was taken of, which goes on as `sampling` says now."""
        conversations = []
        for saved in state["responses"]:
            request = GenerationRequest(
                saved["request_id"], tuple(record.prompt_ids), sampling, group_id=record.prompt_id, seed=saved["seed"]
            )
            conversations.append(Conversation(request, context_length=context_length))
            arrays = {name: each.numpy() if isinstance(each, torch.Tensor) else each for name, each in saved.items()}
            conversations[-1].load_state_dict(arrays)
        return cls(record, conversations)


def _with_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(each) if isinstance(each, np.ndarray) else each for name, each in state.items()}


async def draw_first_whole(
    engine: RolloutEngine,
    groups: Sequence[BegunGroup],
    wanted: int,
    *,
    seed: int,
    wait_for_weights: Callable[[WeightsNeeded], Awaitable[None]],
) -> list[BegunGroup]:
    """The `wanted` groups that are whole first, in the order of `groups`; the others have what they had drawn by then.

    Args:
        seed: the recipe's; each turn of a response has a seed of its own.
        wait_for_weights: returns when the servers that wait for weights have been given them.
    """
    whole = [group for group in groups if group.whole]
    while len(whole) < wanted:
        await _one_turn(engine, groups, whole, wanted, seed, wait_for_weights)
    taken = {id(group) for group in whole[:wanted]}
    return [group for group in groups if id(group) in taken]


async def _one_turn(
    engine: RolloutEngine,
    groups: Sequence[BegunGroup],
    whole: list[BegunGroup],
    wanted: int,
    seed: int,
    wait_for_weights: Callable[[WeightsNeeded], Awaitable[None]],
) -> None:
    """Each open response's next turn, until enough groups are `whole`, to which they are added as they become it."""
    open_turns: dict[str, tuple[BegunGroup, Conversation, GenerationRequest]] = {}
    for group in groups:
        for conversation in group.conversations:
            if (turn := conversation.next_request()) is not None:
                turn = replace(turn, seed=request_seed(seed, turn.request_id))
                open_turns[turn.request_id] = group, conversation, turn
    pausing: asyncio.Task[None] | None = None

    def note(result: GenerationResult) -> None:
        nonlocal pausing
        if (found := open_turns.pop(result.request_id, None)) is None:
            return
        group, conversation, _ = found
        conversation.add(result)
        if group.whole and group not in whole:
            whole.append(group)
        if len(whole) >= wanted and open_turns and pausing is None:
            pausing = asyncio.get_running_loop().create_task(engine.pause())

    try:
        while open_turns and pausing is None:
            try:
                for result in await engine.generate([turn for *_, turn in open_turns.values()], on_result=note):
                    note(result)
            except WeightsNeeded as need:
                if pausing is None:  # else what the servers have lost is not wanted any more
                    await wait_for_weights(need)
    finally:
        if pausing is not None:
            await pausing
            await engine.resume()
