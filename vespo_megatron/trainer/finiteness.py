"""Finiteness veto: whether an update's loss and gradients are finite on every rank, before any weight changes.

Not to be confused with `loss_fn.on_bad_sample`, which judges single samples by their own numbers (log-probs, rewards)
and either names them in an error or leaves them out of the loss. Here the update as a whole is judged, after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vespo_megatron.megatron.policy import MegatronPolicy


@dataclass(frozen=True)
class FinitenessVerdict:
    """The ranks on which something was not finite; the same on every rank."""

    loss: tuple[int, ...]
    own_gradient: tuple[int, ...]
    """Before ranks added their gradients up: where it began."""
    gradient: tuple[int, ...]
    """After that: who would have stepped with it."""

    @property
    def finite(self) -> bool:
        """Whether the update can be taken."""
        return not (self.loss or self.own_gradient or self.gradient)

    def __str__(self) -> str:
        kinds = (("loss", self.loss), ("gradient", self.own_gradient))
        parts = [f"{kind} of rank {', '.join(map(str, ranks))}" for kind, ranks in kinds if ranks]
        return " and ".join(parts) or f"summed gradient on rank {', '.join(map(str, self.gradient))}"


def finiteness(policy: MegatronPolicy, reports: Sequence[Any]) -> FinitenessVerdict:
    """Look at this update on every rank; a collective, between the gradients and the optimizer's step."""
    rank_info = policy.rank_info
    losses = [output.loss.detach() for output, _ in reports]
    own = [
        all(bool(torch.isfinite(loss).all()) for loss in losses),
        policy.own_gradients_finite,
        policy.gradients_finite(),
    ]
    flags = torch.tensor([not good for good in own], dtype=torch.int32, device=rank_info.device)
    everyone = [torch.empty_like(flags) for _ in range(rank_info.world_size)]
    dist.all_gather(everyone, flags)
    columns = torch.stack(everyone).cpu().T
    return FinitenessVerdict(*(tuple(column.nonzero().flatten().tolist()) for column in columns))
