"""Training in float16 on the device: nearer to float64 than bfloat16, one loss scale, and what overflows is skipped."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_policy import Transformers, by_sample, linear_loss, make_batch, make_policy, micro_batches, weights

HOST = torch.device("cpu")
BATCH = {"lengths": ((4, 60),) * 8}


def off(policy, scores) -> torch.Tensor:
    """|log-prob − float64's| of every token of `BATCH`."""
    batches = micro_batches(policy, make_batch(**BATCH))
    found = by_sample(batches, policy.log_probs(batches))
    return torch.cat([(found[name].cpu().double() - scores[name].double())[0].abs() for name in scores])


def test_log_probs_are_nearer_to_float64_than_in_bfloat16(device, rank_info, tiny_folder, note):
    """Each at its own rounded weights. Medians, since a token whose experts flip is far off."""
    apart = {}
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype)[6:]
        scores = Transformers(tiny_folder, torch.float64, device, rounded=dtype).scores(make_batch(**BATCH))
        apart[name] = off(make_policy(tiny_folder, rank_info, name), scores)
        note(**{f"median in {name}": float(apart[name].median())})
    assert apart["float16"].isfinite().all()
    assert apart["float16"].median() < apart["bfloat16"].median() / 4
    assert apart["float16"].mean() < apart["bfloat16"].mean()


def test_log_probs_are_as_near_as_transformers_float16(device, rank_info, tiny_folder, note):
    scores = Transformers(tiny_folder, torch.float64, device, rounded=torch.float16).scores(make_batch(**BATCH))
    theirs = Transformers(tiny_folder, torch.float16, device, rounded=torch.float16).scores(make_batch(**BATCH))
    theirs = torch.cat([(theirs[name].double() - scores[name].double())[0].abs() for name in scores]).cpu()
    ours = off(make_policy(tiny_folder, rank_info, "float16"), scores)
    note(ours=float(ours.median()), **{"transformers'": float(theirs.median())})
    assert ours.median() <= 1.3 * theirs.median(), f"{ours.median():.3g} where transformers has {theirs.median():.3g}"


@pytest.mark.parametrize("grouped", [True, False])
def test_an_update_is_unscaled_before_its_norm_is_taken(grouped, rank_info, tiny_folder, close, note):
    policy = make_policy(tiny_folder, rank_info, "float16", moe_grouped_gemm=grouped)
    batch = make_batch()
    exact = Transformers(tiny_folder, torch.float64, HOST, rounded=torch.float16).gradients(batch)
    norm = math.sqrt(sum(float(each.square().sum()) for each in exact.values()))
    before = weights(policy)
    result = policy.update(micro_batches(policy, batch), linear_loss)
    note(norm=abs(result.grad_norm / norm - 1))
    assert result.succeeded and not result.overflowed and result.loss_scale == 2.0**16 == policy.loss_scale.value
    assert result.grad_norm == pytest.approx(norm, rel=1e-2)
    moved = [name for name, tensor in weights(policy).items() if not torch.equal(tensor, before[name])]
    assert len(moved) == len(before)


@pytest.mark.parametrize("sharded", [True, False])
def test_an_overflow_moves_the_scale_alone(sharded, rank_info, tiny_folder):
    settings = {
        "optimizer.initial_loss_scale": 2.0**32,
        "optimizer.hysteresis": 1,
        "optimizer.use_distributed_optimizer": sharded,
        "scheduler.lr_warmup_iters": 4,
        "scheduler.lr_warmup_init": 1e-4,
    }
    policy = make_policy(tiny_folder, rank_info, "float16", **settings)
    batches = micro_batches(policy, make_batch())
    start, scores, rate = weights(policy), policy.log_probs(batches), policy.optimizer.param_groups[0]["lr"]
    for skipped in range(40):
        result = policy.update(batches, linear_loss)
        assert result.loss_scale == 2.0 ** (32 - skipped) and result.learning_rate == rate
        if result.succeeded:
            break
        assert result.overflowed and math.isnan(result.grad_norm) and policy.updates_taken == 0
        assert all(torch.equal(tensor, start[name]) for name, tensor in weights(policy).items())
        assert all(torch.equal(now, then) for now, then in zip(policy.log_probs(batches), scores, strict=True))
    assert 1 <= skipped < 30 and policy.updates_taken == 1
    assert result.grad_norm < math.inf and policy.loss_scale.value == result.loss_scale
    assert policy.optimizer.param_groups[0]["lr"] > rate, "the schedule moves with the first update that is taken"
    assert any(not torch.equal(tensor, start[name]) for name, tensor in weights(policy).items())
