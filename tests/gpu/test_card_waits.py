"""The micro-batches of an update never wait for the device: the host prepares work while the device does it.

From the first forward of an update to the end of its last backward, nothing reads a value. After that the policy looks
whether its gradients are finite, and the optimizer at their norm; before it micro-batches are copied to the device.
Not covered: expert parallel sizes above one, where megatron-core's dispatcher fetches the experts' counts for its
all-to-all in every layer; and passes that record routes, which fetch them once for every micro-batch.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_policy import linear_loss, make_batch, make_policy, micro_batches

from vespo_megatron.errors import UserError
from vespo_megatron.losses import Normalizer, objective_names
from vespo_megatron.megatron.policy import RouteUse
from vespo_megatron.recipe.schema import LossConfig
from vespo_megatron.routing_replay.table import slice_routes
from vespo_megatron.trainer.objective import Objective

# isort: split
from megatron.core.utils import get_model_config

pytestmark = pytest.mark.cuda


def unwaiting(policy) -> None:
    """A wait for the device between the first forward and the end of the last backward is an error."""
    policy.on_progress = lambda: torch.cuda.set_sync_debug_mode("error")
    config = get_model_config(policy.chunks[0])
    finalize = config.finalize_model_grads_func

    def look_again(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("default")
        return finalize(*args, **kwargs)

    config.finalize_model_grads_func = look_again


@pytest.fixture(autouse=True)
def default_mode():
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_mode_sees_a_wait(device):
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(3, device=device).sum().item()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("replay", [False, True])
def test_forward_and_backward(replay, recompute, rank_info, tiny_folder):
    policy = make_policy(tiny_folder, rank_info, "bfloat16", activation_checkpointing=recompute)
    batches = micro_batches(policy, make_batch(routed=True))
    use = RouteUse()
    if replay:
        for each in batches:
            samples = each.batch.samples
            each.engine_routes = slice_routes(samples, each.layout, policy.moe_layers, topk=2, num_experts=8)
        use = RouteUse("replay", lambda each: (each.engine_routes, None))
    policy.update(batches, linear_loss, routes=use)  # what is made once may wait: cuBLAS's workspace, Triton's kernels
    unwaiting(policy)
    result = policy.update(batches, linear_loss, routes=use)
    assert result.succeeded and torch.cuda.get_sync_debug_mode() == 0


def configurations() -> dict[str, tuple[LossConfig, str]]:
    """Every objective whose loss looks at no other micro-batch, and one with a correction of the mismatch."""
    waits = ("minpro", "bapo", "m2po", "clip_cov", "kl_cov")
    found = {
        f"{name}, {behavior}": (LossConfig(name=name), behavior)
        for name in objective_names()
        if name not in waits
        for behavior in ("rollout", "recompute")
    }
    correction = {"weight": "tis", "high": 2.0, "normalize": True}
    found["corrected"] = (LossConfig(name="grpo", correction=correction), "recompute")
    return found


def test_objectives(rank_info, tiny_folder):
    """With what an asynchronous run reports by lag, and with KL and entropy terms."""
    policy = make_policy(tiny_folder, rank_info, "bfloat16")
    batch = make_batch()
    batch.lags = np.arange(len(batch)) % 3
    batches = micro_batches(policy, batch)
    for each, output in zip(batches, policy.log_probs(batches), strict=True):
        each.old_log_probs = each.ref_log_probs = output[0].clone()
    normalizer = Normalizer.from_lengths([len(sample.response_ids) for sample in batch.samples])
    finalize = get_model_config(policy.chunks[0]).finalize_model_grads_func
    failures = {}
    for name, (config, behavior) in configurations().items():
        try:
            objective = Objective(config, behavior, max_lag=2)
        except UserError:  # an objective that has no meaning without π_old
            continue
        loss = objective.loss_function(normalizer)
        policy.compute_gradients(batches, loss)  # what is made once may wait
        unwaiting(policy)
        try:
            assert policy.compute_gradients(batches, loss)
        except RuntimeError as error:
            failures[name] = str(error).splitlines()[0]
        torch.cuda.set_sync_debug_mode("default")
        get_model_config(policy.chunks[0]).finalize_model_grads_func = finalize
        policy.on_progress = lambda: None
    assert not failures
