"""Optimizer updates on the device against PyTorch's AdamW on the host, and gradients with and without recompute."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_policy import gradients, linear_loss, make_batch, make_policy, micro_batches, weights

from vespo_megatron.megatron.policy import DTYPES

LR, EPS, DECAY, CLIP = 1e-3, 1e-5, 0.1, 0.5


def expected(start, steps_of_gradients, precision):
    """The weights after AdamW with clipping by the global norm, float32 weights within, as `precision` shows them."""
    leaves = {name: torch.nn.Parameter(tensor.float().cpu().clone()) for name, tensor in start.items()}
    decayed = [leaf for leaf in leaves.values() if leaf.dim() > 1]
    plain = [leaf for leaf in leaves.values() if leaf.dim() == 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=EPS, betas=(0.9, 0.999))
    for step in steps_of_gradients:
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in step.values()))
        for name, leaf in leaves.items():
            leaf.grad = step[name].float().cpu() * min(1.0, CLIP / (norm + 1e-6))
        optimizer.step()
    dtype = DTYPES[precision]
    return {name: leaf.detach().to(dtype) for name, leaf in leaves.items()}, norm


OVERLAP = {
    "distributed_data_parallel_config.overlap_grad_reduce": True,
    "distributed_data_parallel_config.overlap_param_gather": True,
}
OFFLOAD = {"optimizer.optimizer_cpu_offload": True, "optimizer.optimizer_offload_fraction": 0.5}


HOW = {
    "sharded": {"optimizer.use_distributed_optimizer": True},
    "whole": {"optimizer.use_distributed_optimizer": False},
    "overlapped": OVERLAP,
}


@pytest.mark.parametrize(
    ("precision", "how"),
    [
        *(
            pytest.param(precision, how, id=f"{name}-{precision}")
            for precision in ("float32", "bfloat16", "float16")
            for name, how in HOW.items()
        ),
        pytest.param("bfloat16", OFFLOAD, id="half of it on the host"),
    ],
)
def test_two_updates_are_those_of_adamw(how, precision, rank_info, tiny_folder, close):
    """Each from the gradients that the policy itself computes: the optimizer alone is judged."""
    settings = {"optimizer.weight_decay": DECAY, "optimizer.clip_grad": CLIP, "optimizer.adam_eps": EPS}
    policy = make_policy(tiny_folder, rank_info, precision, **settings | how)
    batches = micro_batches(policy, make_batch())
    start, taken = weights(policy), []
    for _ in range(2):
        taken.append(gradients(policy, batches))
        result = policy.update(batches, linear_loss)
        assert result.succeeded
    wanted, norm = expected(start, taken, precision)
    assert result.grad_norm == pytest.approx(norm, rel=1e-3), "the norm before clipping"
    found = weights(policy)
    bound = {"float32": 5e-3, "float16": 1e-2, "bfloat16": 5e-2}[precision]  # bfloat16: a change is a few of its steps
    together = [
        torch.cat([(each[name].cpu().double() - start[name].cpu().double()).flatten() for name in start])
        for each in (found, wanted)
    ]
    assert together[1].norm() > 0
    close("the change of all weights", *together, bound)


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("bfloat16", 5e-3), ("float16", 1e-3)])
def test_recompute_gives_the_same_gradients(precision, bound, rank_info, tiny_folder, close, note):
    batch = make_batch()
    found = {}
    for recompute in (False, True):
        policy = make_policy(tiny_folder, rank_info, precision, activation_checkpointing=recompute)
        found[recompute] = gradients(policy, micro_batches(policy, batch))
    note(**{"to the last bit": all(torch.equal(found[True][name], each) for name, each in found[False].items())})
    for name, gradient in found[False].items():
        close(f"gradient of {name}", found[True][name], gradient, bound)


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_gradients_kept_in_16_bits(precision, bound, rank_info, tiny_folder, close):
    """`grad_reduce_in_fp32: false`: what every kernel adds to is then narrower."""
    narrow = {"distributed_data_parallel_config.grad_reduce_in_fp32": False}
    wide, policy = (
        make_policy(tiny_folder, rank_info, precision),
        make_policy(tiny_folder, rank_info, precision, **narrow),
    )
    found, wanted = (gradients(each, micro_batches(each, make_batch())) for each in (policy, wide))
    for name, gradient in wanted.items():
        close(f"gradient of {name}", found[name], gradient, bound)


def test_a_gradient_that_is_not_finite_is_seen(rank_info, tiny_folder):
    policy = make_policy(tiny_folder, rank_info)
    batches = micro_batches(policy, make_batch())

    def broken(log_probs, entropies, micro_batch):
        return (log_probs * float("nan")).sum(), None

    policy.compute_gradients(batches, linear_loss)
    assert policy.own_gradients_finite
    policy.compute_gradients(batches, broken)
    assert not policy.own_gradients_finite


def test_a_copy_of_the_weights_comes_back_exactly(rank_info, tiny_folder):
    """The old policy's weights wait in host memory while others are in use."""
    policy = make_policy(tiny_folder, rank_info, "bfloat16")
    batches = micro_batches(policy, make_batch())
    policy.keep_reference()
    before = policy.log_probs(batches)
    policy.update(batches, linear_loss)
    own = weights(policy)
    again = policy.ref_log_probs(batches)
    for name, tensor in weights(policy).items():
        assert torch.equal(tensor, own[name]), f"{name} did not come back"
    for one, other in zip(before, again, strict=True):
        assert (one - other).norm() <= 1e-3 * one.norm()


def test_router_losses(device, rank_info, tiny_folder, close):
    """Load balancing and z-loss: values and gradients on the device are those on the host."""
    settings = {
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "moe_z_loss_coeff": 0.01,
        "track_moe_metrics": True,
    }
    policy = make_policy(tiny_folder, rank_info, **settings)
    batches = micro_batches(policy, make_batch())
    policy.count_choices(batches)
    result = policy.update(batches, linear_loss)
    assert result.router_losses.shape == (2, 3) and result.router_losses.isfinite().all()
    assert (result.router_losses[0] >= 0.99).all(), "load balancing is at least one"
    tokens = sum(int(each.is_real.sum()) for each in batches)
    assert (result.expert_load.sum(1) == 2 * tokens).all(), "every token has two experts in every layer"
