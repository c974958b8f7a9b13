"""Routing Replay on the device: one's own routes change nothing, other routes are really taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_policy import MOE_LAYERS, TOPK, by_sample, gradients, make_batch, make_policy, micro_batches

from vespo_megatron.megatron.policy import RouteUse
from vespo_megatron.routing_replay.table import slice_routes

RECORD = RouteUse("record", lambda each: (each.trainer_routes, None))
REPLAY = RouteUse("replay", lambda each: (each.trainer_routes, None))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-6), ("bfloat16", 1e-3), ("float16", 1e-4)])
def test_own_routes_replayed_change_nothing(precision, bound, recompute, rank_info, tiny_folder, close, note):
    """R2: the same kernels run on the same numbers; only sums by atomic additions may come out in another order."""
    policy = make_policy(tiny_folder, rank_info, precision, activation_checkpointing=recompute)
    batches = micro_batches(policy, make_batch())
    for each in batches:
        each.trainer_routes = policy.empty_routes(each)
    live = policy.log_probs(batches)
    recorded = policy.log_probs(batches, routes=RECORD)
    replayed = policy.log_probs(batches, routes=REPLAY)
    note(**{"to the last bit": all(torch.equal(a, b) for a, b in zip(live, replayed, strict=True))})
    for index, (once, again, third) in enumerate(zip(live, recorded, replayed, strict=True)):
        close(f"recorded, micro-batch {index}", again, once, bound)
        close(f"replayed, micro-batch {index}", third, once, bound)
    before, after = gradients(policy, batches), gradients(policy, batches, routes=REPLAY)
    for name, gradient in before.items():
        close(f"gradient of {name}", after[name], gradient, 20 * bound)


def test_what_is_recorded_is_what_the_routers_choose(rank_info, tiny_folder):
    policy = make_policy(tiny_folder, rank_info)
    batches = micro_batches(policy, make_batch())
    for each in batches:
        each.trainer_routes = policy.empty_routes(each)
    tables = RouteUse("replay", lambda each: (each.trainer_routes, each.engine_routes))
    policy.log_probs(batches, routes=RECORD)
    for each in batches:
        each.engine_routes = policy.empty_routes(each)
    policy.log_probs(batches, routes=tables)  # what they would choose beside what is replayed
    for each in batches:
        assert np.array_equal(np.sort(each.engine_routes.experts), np.sort(each.trainer_routes.experts))
        each.trainer_routes.check(8, "recorded routes")


def test_routes_of_an_engine_are_taken(device, rank_info, tiny_folder, close):
    """R3: routes that no router would choose give on the device what they give on the host."""
    policy = make_policy(tiny_folder, rank_info)
    batch = make_batch(routed=True)
    batches = micro_batches(policy, batch)
    for each in batches:
        each.engine_routes = slice_routes(each.batch.samples, each.layout, policy.moe_layers, topk=TOPK, num_experts=8)
        assert each.engine_routes.experts.shape[1:] == (MOE_LAYERS, TOPK)
    use = RouteUse("replay", lambda each: (each.engine_routes, None))
    live, found = policy.log_probs(batches), policy.log_probs(batches, routes=use)
    apart = torch.cat([(a - b)[0].abs() for a, b in zip(live, found, strict=True)])
    assert apart.median() > 1e-2, "the routes made no difference"
    wanted = scored_with(tiny_folder, batch)
    for name, scores in by_sample(batches, found).items():
        close(f"log-probs of {name}", scores[0], wanted[name], 5e-6)


def scored_with(tiny_folder, batch) -> dict[str, torch.Tensor]:
    """Log-probs of transformers in float64 whose routers are told what to choose; the last token chooses itself."""
    from gpu_policy import Transformers

    theirs = Transformers(tiny_folder, torch.float64, torch.device("cpu"))
    routers = [layer.mlp.gate for layer in theirs.model.model.layers if hasattr(layer.mlp, "experts")]
    at_hand: list[np.ndarray] = []

    def told(router, inputs, column):
        own = type(router).forward(router, *inputs)
        logits, experts = own[0], own[2].clone()
        routes = torch.from_numpy(at_hand[-1][:, column].astype(np.int64))
        experts[: len(routes)] = routes
        gates = logits.softmax(-1).gather(1, experts)
        return logits, gates / gates.sum(-1, keepdim=True), experts

    for column, router in enumerate(routers):
        router.forward = lambda *inputs, router=router, column=column: told(router, inputs, column)
    answers = {}
    with torch.no_grad():
        for sample in batch.samples:
            at_hand.append(sample.routes)
            answers[sample.sample_id] = theirs.score(sample)[0]
    return answers


def test_router_scores_and_shift(rank_info, tiny_folder):
    """γ of a policy that has not moved is one."""
    policy = make_policy(tiny_folder, rank_info)
    batches = micro_batches(policy, make_batch())
    for each in batches:
        each.router_scores = policy.empty_router_scores(each)
    policy.log_probs(batches, routes=RouteUse(scores=lambda each: each.router_scores))
    policy.log_probs(batches, routes=RouteUse(measures_shift=True))
    for each in batches:
        assert each.router_shift.shape == each.mask.shape
        assert (each.router_shift - 1).abs().max() < 1e-4, float(each.router_shift.min())
