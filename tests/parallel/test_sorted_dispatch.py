"""A GPU's way to sort tokens by expert, here on the host, against megatron-core's."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import permute, unpermute

from vespo_megatron.megatron.native.dispatch import Places, _Collect, _Spread


@pytest.mark.parametrize(("tokens", "experts", "count"), [(1, 2, 1), (37, 8, 2), (64, 16, 16)])
def test_as_megatron_core_sorts(tokens, experts, count):
    torch.manual_seed(tokens)
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool)
    routing_map.scatter_(1, torch.rand(tokens, experts).topk(count)[1], True)
    hidden = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(tokens, experts, dtype=torch.float64)
    factor = torch.randn(tokens * count, 1, dtype=torch.float64)

    rows, gates, order = permute(hidden, routing_map, probs)
    upstream = unpermute(rows * factor, order, hidden.shape)
    gradient = torch.randn_like(upstream)
    (expected,) = torch.autograd.grad(upstream, hidden, gradient)

    places = Places.of(routing_map, count)
    own = _Spread.apply(hidden, places)
    collected = _Collect.apply(own * factor, places)
    (found,) = torch.autograd.grad(collected, hidden, gradient)

    assert torch.equal(places.tokens, order)
    assert torch.equal(own, rows)
    assert torch.equal(probs.gather(1, places.experts).flatten().index_select(0, places.choices), gates)
    torch.testing.assert_close(collected, upstream, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
