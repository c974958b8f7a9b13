"""Router shift (RSPO, arXiv 2510.23027): how far the routers have moved since π_old, as a weight of each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.metrics import MetricSums
from vespo_megatron.losses.registry import unknown

APPLY = ("before_clip", "after_clip")
SMALLEST = 1e-8
"""No γ̃ is below this, whatever the floor: its logarithm is finite in float32."""


@dataclass(frozen=True)
class RouterShift:
    """What the loss does with γ.

    Raises:
        UserError: values that mean nothing.
    """

    apply: str = "before_clip"
    """before_clip: γ̃ multiplies the ratio, so that φ sees both; after_clip: it multiplies φ of its token."""
    floor: float = 0.8
    """γ_min, in (0, 1]: γ̃ = max(γ, γ_min)."""

    def __post_init__(self) -> None:
        if self.apply not in APPLY:
            raise unknown("order", str(self.apply), APPLY, where="loss_fn.router_shift.apply")
        if not 0 < self.floor <= 1:
            raise UserError(f"is {self.floor}", where="loss_fn.router_shift.floor", expected="a number in (0, 1]")

    def log_weight(self, shift: Tensor) -> Tensor:
        """log γ̃ of γ; shapes as given. What is NaN stays NaN."""
        return shift.clamp(min=max(self.floor, SMALLEST)).log()


def layer_distance(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """d of one layer: the mean over experts of |log r_θ − log r_old|, [..., K] → [...]; without gradient."""
    return (log_probs.detach() - old_log_probs.detach()).abs().mean(dim=-1)


def router_shift(log_probs: Tensor, old_log_probs: Tensor, *, floor: float = 0.8) -> Tensor:
    """γ̃ = max(γ, `floor`) of each token, γ = exp(−mean over layers of d_l): [tokens], without gradient.

    d_l is the mean of |log r_θ − log r_old| over the K experts of layer l that were active under π_old, r the router's
    softmax over all experts. RSPO (arXiv 2510.23027): the abstract was read, the equations as others quote them; .8 is
    the floor they quote.

    Args:
        log_probs: [tokens, layers, K], log r_θ of those experts.
        old_log_probs: [tokens, layers, K], log r_old of the same.
        floor: 0 leaves γ as it is.

    Raises:
        UserError: shapes that differ, or no layer.
    """
    if log_probs.shape != old_log_probs.shape or log_probs.dim() != 3 or 0 in log_probs.shape[1:]:
        raise UserError(
            f"has shape {tuple(log_probs.shape)}, and old_log_probs {tuple(old_log_probs.shape)}",
            where="log_probs",
            expected="[tokens, layers, K] twice: the same experts, those that were active under π_old",
        )
    return torch.exp(-layer_distance(log_probs, old_log_probs).mean(dim=-1)).clamp(min=floor)


def check_router_shift(shift: Tensor | None, mask: Tensor | None) -> None:
    """Raise UserError for a γ that is none, where that takes no wait for a device; NaN is a bad sample's."""
    if shift is None or not shift.is_cpu or not shift.numel():
        return
    values = shift.detach() if mask is None else torch.where(mask, shift.detach(), 1.0)
    for found in (values.nan_to_num(1.0).amin().item(), values.nan_to_num(1.0).amax().item()):
        if not 0 <= found <= 1:
            raise UserError(
                f"holds {found:.4g}",
                where="router_shift",
                expected="γ = exp(−d) of each token, in [0, 1]",
                fix="vespo_megatron.losses.router_shift makes it of the routers' log-probs",
            )


def router_shift_metrics(shift: Tensor, config: RouterShift, valid: Tensor | None) -> MetricSums:
    """Of this rank's tokens: γ or γ̃ [tokens], `valid` bool [tokens] (None: all)."""
    metrics = MetricSums()
    weight = config.log_weight(shift).exp()
    floored = shift <= config.floor
    if valid is not None:
        weight, floored = torch.where(valid, weight, 0.0), floored & valid
    count = float(len(shift)) if valid is None else valid.sum()
    metrics.add("router_shift/mean", weight.sum(dtype=torch.float64), count)
    metrics.add("router_shift/floored", floored.sum(), count)
    return metrics
