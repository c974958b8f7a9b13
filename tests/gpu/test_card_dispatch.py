"""Tokens sorted by expert and summed up again against megatron-core's way, which waits for the device."""

from __future__ import annotations

import pytest
import torch

from vespo_megatron.megatron.native.dispatch import Places, _Collect, _Spread

# isort: split
from megatron.core.transformer.moe.moe_utils import permute, unpermute


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(40, 8, 2), (1, 8, 8), (300, 128, 8), (5, 3, 1), (0, 8, 2)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_it_is_megatron_cores(tokens, experts, topk, dtype, bound, device, host_generator, close):
    scores = torch.rand(tokens, experts, generator=host_generator)
    scores[:, experts // 2] -= 2 * (experts > topk)  # one that nobody chooses
    chosen = scores.topk(topk, dim=1).indices
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True).to(device)
    gates = (scores.to(device) * routing_map).requires_grad_()
    hidden = torch.randn(tokens, 1, 16, generator=host_generator).to(device, dtype).requires_grad_()
    scale = torch.randn(tokens * topk, 16, generator=host_generator).to(device, dtype)
    upstream = torch.randn(tokens, 1, 16, generator=host_generator).to(device, dtype)

    places = Places.of(routing_map, topk)
    rows = _Spread.apply(hidden.view(-1, 16), places)
    probs = gates.gather(1, places.experts).flatten().index_select(0, places.choices)
    output = _Collect.apply(rows * scale * probs[:, None].to(dtype), places).view(hidden.shape)
    found = torch.autograd.grad(output, (hidden, gates), upstream)

    flat = hidden.view(-1, 16)
    their_rows, their_probs, order = permute(flat, routing_map, probs=gates, num_out_tokens=tokens * topk)
    assert torch.equal(rows, their_rows) and torch.equal(probs, their_probs)
    exact = hidden.detach().double().requires_grad_(), gates.detach().double().requires_grad_()
    wide, wide_probs, _ = permute(exact[0].view(-1, 16), routing_map, probs=exact[1], num_out_tokens=tokens * topk)
    expected = unpermute(wide * scale.double() * wide_probs[:, None], order, flat.shape).view(hidden.shape)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    close("output", output, expected, bound)
    close("gradient of tokens", found[0], wanted[0], bound)
    close("gradient of gates", found[1], wanted[1], bound)
