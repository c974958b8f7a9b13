"""Every objective on the card is what it is on the host."""

from __future__ import annotations

import contextlib

import pytest
import torch

from vespo_megatron.errors import UserError
from vespo_megatron.losses import LossInputs, Normalizer, PolicyLossConfig, compute_policy_loss, objective_names

LENGTHS = [5, 1, 300, 47, 2000]


def configurations():
    """Objective and behaviour policy, but for objectives that have no meaning without π_old."""
    for name in objective_names():
        for behavior in ("rollout", "recompute"):
            with contextlib.suppress(UserError):
                yield PolicyLossConfig(name, behavior=behavior, metrics="full")


@pytest.mark.parametrize("config", configurations(), ids=lambda config: f"{config.name}, {config.behavior}")
def test_loss_and_gradient_are_the_host_s(config, device):
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    tokens = int(cu_seqlens[-1])
    log_probs = -3 * torch.rand(tokens, generator=generator)
    behavior_log_probs = log_probs + 0.1 * torch.randn(tokens, generator=generator)
    old = log_probs + 0.05 * torch.randn(tokens, generator=generator)
    advantages = torch.randn(len(LENGTHS), generator=generator)
    found = {}
    for where in ("cpu", device):
        leaf = log_probs.to(where, copy=True).requires_grad_()
        given = LossInputs(
            leaf,
            behavior_log_probs.to(where),
            advantages.to(where),
            cu_seqlens,
            advantage_level="sequence",
            old_log_probs=old.to(where),
        )
        output = compute_policy_loss(given, config, Normalizer(float(tokens), float(len(LENGTHS))))
        output.loss.backward()
        found[str(where)] = output.loss.detach().cpu(), leaf.grad.cpu()
    for ours, host in zip(found[str(device)], found["cpu"], strict=True):
        torch.testing.assert_close(ours, host, rtol=2e-4, atol=1e-7)
