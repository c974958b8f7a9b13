"""Correction biases of routers that learn: megatron-core's rule, once per update that is taken, padding left out.

megatron-core moves them while it finalises gradients (finalize_model_grads.py:476): also where nothing but gradients
was wanted, and where the update is then refused. Here they move after the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from megatron.core.transformer.moe.router import TopKRouter


def move_correction_biases(routers: Sequence[TopKRouter], counts: torch.Tensor, rate: float) -> None:
    """Move the biases of this rank's routers up by `rate` where an expert has fewer tokens than the mean, else down.

    Args:
        counts: [routers, experts], how many of this rank's tokens went to each expert. A collective of a stage's ranks.
    """
    if routers:
        biases = torch.stack([router.expert_bias for router in routers])
        for router, bias in zip(routers, get_updated_expert_bias(counts.float(), biases, rate), strict=True):
            router.expert_bias.copy_(bias)
