"""`torch.compile(fullgraph=True)` takes the loss whole: no graph break, the same gradient."""

import pytest
import torch

from tests.losses.batches import make_batch
from vespo_megatron.losses import get_objective, objective_names, policy_loss

TRACED = [name for name in objective_names() if name != "minpro" and (name == "bapo" or not get_objective(name).search)]
"""The others wait: for the longest response, or for every token of the call."""
CORRECTIONS = [
    None,
    {"weight": "tis", "high": 1.1, "veto": 0.5},
    {
        "weight": "mis",
        "level": "sequence",
        "normalize": True,
        "reject": [{"statistic": "k3", "level": "token", "high": 1}],
    },
]


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def gradient(function, batch):
    leaf = batch.log_probs.where(batch.mask, -1.0).requires_grad_()
    function(leaf, batch.behavior_log_probs, batch.advantages, batch.cu_seqlens, batch.mask).backward()
    return leaf.grad


@pytest.mark.parametrize("name", TRACED)
def test_an_objective_is_one_graph(name):
    batch = make_batch(3)
    metrics = "full" if name in ("vespo", "grpo") else "none"
    with_old = {"old_log_probs": batch.old_log_probs} if get_objective(name).anchor == "old" else {}

    def loss(log_probs, behavior, advantages, cu_seqlens, mask):
        return policy_loss(
            log_probs, behavior, advantages, cu_seqlens, mask=mask, name=name, metrics=metrics, **with_old
        ).loss

    torch.testing.assert_close(gradient(compiled(loss), batch), gradient(loss, batch), rtol=1e-12, atol=1e-14)


def test_so_is_one_with_hyperparameters():
    batch = make_batch(3)

    def loss(log_probs, behavior, advantages, cu_seqlens, mask):
        given = {"clip_low": 0.1, "dual_clip": None, "opsm_delta": 0.1}
        return policy_loss(
            log_probs, behavior, advantages, cu_seqlens, mask=mask, name="grpo", metrics="none", **given
        ).loss

    torch.testing.assert_close(gradient(compiled(loss), batch), gradient(loss, batch), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", ["vespo", "grpo"])
def test_so_is_one_with_a_correction(name, correction):
    batch = make_batch(3)

    def loss(log_probs, behavior, advantages, cu_seqlens, mask):
        return policy_loss(
            log_probs,
            behavior,
            advantages,
            cu_seqlens,
            mask=mask,
            name=name,
            old_log_probs=batch.old_log_probs,
            correction=correction,
            metrics="none",
        ).loss

    torch.testing.assert_close(gradient(compiled(loss), batch), gradient(loss, batch), rtol=1e-12, atol=1e-14)
