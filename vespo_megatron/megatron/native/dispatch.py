"""Tokens sorted by expert and summed up again, without a wait for the device and without an addition in a race.

megatron-core's own `permute` finds the rows by a boolean mask, for which the host waits (moe_utils.py:369), and adds
an expert's answers with `scatter_add`, one atomic addition a number; the gradient of the sort is the same again. Here
where every token went is known from either side, so that both directions read rows and write them once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from vespo_megatron.megatron.native.experts import has_kernels


@dataclass(frozen=True)
class Places:
    """Of T tokens with k experts each: N = T·k rows sorted by expert, then by token."""

    experts: torch.Tensor
    """int64 [T, k], ascending."""
    positions: torch.Tensor
    """int64 [T, k]: the row of each choice."""
    choices: torch.Tensor
    """int64 [N]: the choice (an index into `experts`, flat) of each row."""
    tokens: torch.Tensor
    """int64 [N]: the token of each row."""

    @staticmethod
    def of(routing_map: torch.Tensor, count: int) -> Places:
        """bool [T, E], `count` of each row true."""
        num_tokens, num_experts = routing_map.shape
        chosen = torch.nonzero_static(routing_map, size=num_tokens * count)
        experts = chosen[:, 1].view(num_tokens, count)
        rank = routing_map.t().flatten().cumsum(0, dtype=torch.int32).view(num_experts, num_tokens)
        positions = rank.t().gather(1, experts).long() - 1
        every = torch.arange(num_tokens * count, device=routing_map.device)
        choices = torch.empty_like(every).scatter_(0, positions.flatten(), every)
        return Places(experts, positions, choices, choices // count)


class _Spread(torch.autograd.Function):
    """[T, H] → [N, H]: every token's row, once per expert."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, places: Places) -> torch.Tensor:
        ctx.places = places
        return hidden.index_select(0, places.tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return sum_rows(gradient.contiguous(), ctx.places.positions), None


class _Collect(torch.autograd.Function):
    """[N, H] → [T, H]: the sum of every token's rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: Places) -> torch.Tensor:
        ctx.places = places
        return sum_rows(rows.contiguous(), places.positions)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.index_select(0, ctx.places.tokens), None


def sum_rows(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """rows [N, H], int64 [T, k] → [T, H], summed in float32 at least."""
    if has_kernels(rows):
        from vespo_megatron.megatron.native import triton_experts

        return triton_experts.sum_rows(rows, positions)
    found = rows.index_select(0, positions.flatten()).view(*positions.shape, rows.shape[1])
    return found.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


class SortedDispatcher(MoEAlltoAllTokenDispatcher):
    """megatron-core's all-to-all, with this module's way to sort and to sum up.

    One rank alone sends nothing and has its rows in order: `tokens_per_expert` then stays on the device.
    """

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[…, H], bool [T, E], [T, E] → rows [N, H] sorted by expert, their gates [N]."""
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        hidden_states = hidden_states.view(-1, self.hidden_shape[-1])
        self.tokens_per_expert = self.preprocess(routing_map)
        if not self._is_alone:
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.tokens_per_expert)
        self.places = Places.of(routing_map, self.config.moe_router_topk)
        gates = probs.gather(1, self.places.experts).flatten().index_select(0, self.places.choices)
        return _Spread.apply(hidden_states, self.places), gates

    def token_dispatch(self, rows: torch.Tensor, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """To the ranks that have the experts."""
        return (rows, gates) if self._is_alone else super().token_dispatch(rows, gates)

    def dispatch_postprocess(
        self, rows: torch.Tensor, gates: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sorted by this rank's experts, with the rows of each."""
        return (rows, self.tokens_per_expert, gates) if self._is_alone else super().dispatch_postprocess(rows, gates)

    def combine_preprocess(self, rows: torch.Tensor) -> torch.Tensor:
        """Back in the order that they came in."""
        return rows if self._is_alone else super().combine_preprocess(rows)

    def token_combine(self, rows: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Back to the ranks that they came from."""
        return rows if self._is_alone else super().token_combine(rows, *args, **kwargs)

    def combine_postprocess(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum of every token's rows, in the shape that hidden states had."""
        return _Collect.apply(rows, self.places).view(self.hidden_shape)

    @property
    def _is_alone(self) -> bool:
        return self.ep_size == 1 and self.tp_size == 1
