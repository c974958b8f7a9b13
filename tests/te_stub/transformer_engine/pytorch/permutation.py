"""Stand-in for pytorch/permutation.py: tokens to the order of experts and back."""

from __future__ import annotations

import torch

calls: list[str] = []
"""The name of every call, for tests."""


def _order(routing_map: torch.Tensor) -> torch.Tensor:
    """The row of `inp` of each output row: expert by expert."""
    return routing_map.bool().t().nonzero()[:, 1]


def moe_permute(inp: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int = -1, max_token_num: int = -1):
    calls.append("permute")
    order = _order(routing_map)
    return inp.index_select(0, order), order


def moe_permute_with_probs(inp: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int = -1):
    calls.append("permute")
    order = _order(routing_map)
    assert num_out_tokens in (-1, None) or len(order) == num_out_tokens
    return inp.index_select(0, order), probs.t().masked_select(routing_map.bool().t()), order


def moe_unpermute(
    inp: torch.Tensor,
    row_id_map: torch.Tensor,
    merging_probs: torch.Tensor | None = None,
    restore_shape: torch.Size | None = None,
):
    calls.append("unpermute")
    assert merging_probs is None
    return inp.new_zeros(restore_shape).index_add(0, row_id_map, inp)


def moe_sort_chunks_by_index_with_probs(
    inp: torch.Tensor, probs: torch.Tensor, split_sizes: torch.Tensor, sorted_index: torch.Tensor
):
    calls.append("sort")
    sizes, order = split_sizes.tolist(), sorted_index.tolist()
    rows, gates = inp.split(sizes), probs.split(sizes)
    return torch.cat([rows[index] for index in order]), torch.cat([gates[index] for index in order])


def moe_sort_chunks_by_index(inp: torch.Tensor, split_sizes: torch.Tensor, sorted_index: torch.Tensor):
    calls.append("sort")
    rows = inp.split(split_sizes.tolist())
    return torch.cat([rows[index] for index in sorted_index.tolist()])
