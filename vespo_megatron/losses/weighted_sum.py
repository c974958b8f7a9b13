"""Weighted sum −Σ weight·log π, the one differentiable step of every objective; its gradient is −weight.

Terms with weight 0 do not count, whatever the log-prob (NaN, −inf).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vespo_megatron.losses.ratio_sums import expand
from vespo_megatron.losses.sequence import PackedSequences


class TokenWeighted(torch.autograd.Function):
    """`apply(log_probs [tokens], weight [tokens])`: a weight per token."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, weight: Tensor) -> Tensor:
        """[]: the sum."""
        ctx.save_for_backward(weight)
        ctx.dtype = log_probs.dtype
        values = log_probs.detach()
        if values.is_cpu and values.dtype == weight.dtype and not torch.compiler.is_compiling():
            total = torch.dot(weight, values)  # one pass and no temporary, unless there is something to leave out
            if total.isfinite():
                return -total
        return -torch.where(weight == 0, 0.0, weight * values).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient of `log_probs`: [tokens]."""
        (weight,) = ctx.saved_tensors
        return (weight * -grad).to(ctx.dtype), None


class SequenceWeighted(torch.autograd.Function):
    """`apply(log_probs [tokens], weight [num_sequences], sums [num_sequences], sequences, mask)`: one per sequence.

    `sums` are the log-probs of each sequence's unmasked tokens on this rank, added up. Nothing of the tokens' size is
    made or kept before the gradient itself.
    """

    @staticmethod
    def forward(
        ctx: Any, log_probs: Tensor, weight: Tensor, sums: Tensor, sequences: PackedSequences, mask: Tensor | None
    ) -> Tensor:
        """[]: the sum."""
        ctx.save_for_backward(weight, mask)
        ctx.sequences, ctx.dtype = sequences, log_probs.dtype
        return -torch.where(weight == 0, 0.0, weight * sums).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient of `log_probs`: [tokens]."""
        weight, mask = ctx.saved_tensors
        return expand(ctx.sequences, weight * -grad, mask, ctx.dtype), None, None, None, None
