"""Tokens to experts and back where one rank has all experts, without a wait for the device.

megatron-core's dispatchers find the rows of an expert by `masked_select` (moe_utils.py:369), which asks the device how
many there are, and fetch the experts' counts to the host (token_dispatcher.py:899): in every layer the host stops until
the device has caught up. Without token dropping there are `topk` rows per token, whoever gets them, so that nothing
needs to be asked. Rows are in megatron-core's order: by expert, then by token. A token's rows are added in the order of
their experts, so the sum is the same every time, which atomic additions do not promise.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher


class _Spread(torch.autograd.Function):
    """A row for every choice: [T, H] → [T · topk, H], row r the token of choice `choice[r]`; see `_Gather`."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, choice: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        return tokens.index_select(0, choice // place.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return _sums(gradient, place), None, None


class _Gather(torch.autograd.Function):
    """The sum of every token's rows: [T · topk, H] → [T, H], `place` [T, topk] where they are; see `_Spread`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, choice: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(choice)
        ctx.topk = place.shape[1]
        return _sums(rows, place)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (choice,) = ctx.saved_tensors
        return gradient.index_select(0, choice // ctx.topk), None, None


def _sums(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return rows.index_select(0, place.flatten()).view(*place.shape, rows.shape[1]).sum(1)


class LocalDispatcher(MoETokenDispatcher):
    """See the module. For groups of one, expert and expert tensor parallel, and no token dropping."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self._shape = torch.Size()
        self._place = self._choice = self._counts = torch.empty(0)

    @staticmethod
    def can_replace(other: MoETokenDispatcher) -> bool:
        """Whether that one, too, sends nothing anywhere."""
        return other.ep_size * other.tp_size == 1 and other.config.moe_expert_capacity_factor is None

    @classmethod
    def of(cls, other: MoETokenDispatcher) -> LocalDispatcher:
        """In place of that one."""
        groups = ProcessGroupCollection(ep=other.ep_group, expt_tp=other.tp_group, tp_ep=other.tp_ep_group)
        return cls(other.config, groups)

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[…, H], `routing_map` bool [T, experts] with `topk` True in every row, gates [T, experts].

        Returns a row for every choice, [T · topk, H], and their gates [T · topk].
        """
        self._shape = tokens.shape
        experts = routing_map.int().topk(self.config.moe_router_topk, dim=1).indices.sort(dim=1).values
        self._counts = routing_map.sum(dim=0)
        # One count of all choices, expert by expert: what it is at a choice says where its row is.
        count = routing_map.t().reshape(-1).cumsum(0, dtype=torch.int32).view(routing_map.shape[::-1]).t()
        self._place = count.gather(1, experts).long() - 1
        numbers = torch.arange(self._place.numel(), device=tokens.device)
        self._choice = torch.empty_like(numbers).scatter_(0, self._place.flatten(), numbers)
        rows = _Spread.apply(tokens.reshape(-1, self._shape[-1]), self._choice, self._place)
        return rows, probs.gather(1, experts).flatten().index_select(0, self._choice)

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing to send."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, tokens of each expert int64 [experts], gates."""
        return hidden_states, self._counts, probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The experts' rows [T · topk, H] → [T, H]."""
        return _Gather.apply(hidden_states, self._choice, self._place)

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Nothing to fetch."""
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, H] → the shape that came in."""
        return hidden_states.view(self._shape)
