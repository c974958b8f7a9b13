"""The dispatcher of a rank that has all experts against megatron-core's, which asks the device for its counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gpu_policy import gradients, make_batch, make_policy, micro_batches

from vespo_megatron.megatron.native.dispatch import LocalDispatcher

# isort: split
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def dispatcher(topk: int) -> LocalDispatcher:
    config = SimpleNamespace(moe_router_topk=topk, moe_expert_capacity_factor=None)
    return LocalDispatcher(config, SimpleNamespace(ep=ALONE, expt_tp=ALONE, tp_ep=ALONE))


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(40, 8, 2), (1, 8, 8), (300, 128, 8), (5, 3, 1), (0, 8, 2)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_it_is_megatron_cores(tokens, experts, topk, dtype, bound, device, generator, close):
    scores = torch.rand(tokens, experts, generator=generator)
    scores[:, experts // 2] -= 2 * (experts > topk)  # one that nobody chooses
    chosen = scores.topk(topk, dim=1).indices
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True).to(device)
    gates = (scores.to(device) * routing_map).requires_grad_()
    hidden = torch.randn(tokens, 1, 16, generator=generator).to(device, dtype).requires_grad_()
    scale = torch.randn(tokens * topk, 16, generator=generator).to(device, dtype)
    upstream = torch.randn(tokens, 1, 16, generator=generator).to(device, dtype)

    ours = dispatcher(topk)
    rows, counts, probs = ours.dispatch_postprocess(
        *ours.token_dispatch(*ours.dispatch_preprocess(hidden, routing_map, gates))
    )
    output = ours.combine_postprocess(
        ours.token_combine(ours.combine_preprocess(rows * scale * probs[:, None].to(dtype)))
    )
    found = torch.autograd.grad(output, (hidden, gates), upstream)

    flat = hidden.view(-1, 16)
    their_rows, their_probs, order = permute(flat, routing_map, probs=gates, num_out_tokens=tokens * topk)
    assert torch.equal(rows, their_rows) and torch.equal(probs, their_probs)
    assert torch.equal(counts, routing_map.sum(0))
    exact = hidden.detach().double().requires_grad_(), gates.detach().double().requires_grad_()
    wide, wide_probs, _ = permute(exact[0].view(-1, 16), routing_map, probs=exact[1], num_out_tokens=tokens * topk)
    expected = unpermute(wide * scale.double() * wide_probs[:, None], order, flat.shape).view(hidden.shape)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    close("output", output, expected, bound)
    close("gradient of tokens", found[0], wanted[0], bound)
    close("gradient of gates", found[1], wanted[1], bound)


def test_a_policy_with_either_is_the_same(rank_info, folder, close):
    found = []
    for local in (True, False):
        policy = make_policy(folder, rank_info)
        for layer in [module for chunk in policy.chunks for module in chunk.modules() if isinstance(module, MoELayer)]:
            given = LocalDispatcher.of(layer.token_dispatcher)
            if not local:
                groups = SimpleNamespace(ep=given.ep_group, expt_tp=given.tp_group, tp_ep=given.tp_ep_group)
                given = MoEAlltoAllTokenDispatcher(8, list(range(8)), given.config, groups)
            layer.token_dispatcher = given
        batches = micro_batches(policy, make_batch())
        found.append((policy.log_probs(batches), gradients(policy, batches)))
    for index, (ours, theirs) in enumerate(zip(found[0][0], found[1][0], strict=True)):
        close(f"micro-batch {index}", ours, theirs, 1e-6)
    for name, gradient in found[1][1].items():
        close(f"gradient of {name}", found[0][1][name], gradient, 1e-5)
