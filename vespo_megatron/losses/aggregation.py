"""Aggregation of per-token terms to one loss, with a denominator fixed before the batch is split.

loss = (Σ over every rank and micro-batch of scale_t·ℓ_t), where scale depends on global counts only. A mini-batch
therefore has the same gradient however it is cut into micro-batches, data parallel or context parallel shares.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.one_line import OneLine
from vespo_megatron.losses.registry import unknown

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "token-sum-norm")


@dataclass(frozen=True, repr=False)
class Normalizer(OneLine):
    """Global counts of one mini-batch (optimizer update), over all ranks and micro-batches.

    Compute it once per update where all lengths are known (`Normalizer.from_lengths` on the controller).
    """

    num_tokens: float | Tensor
    """Unmasked response tokens."""
    num_sequences: float | Tensor
    """Sequences with at least one unmasked token."""
    length: float | None = None
    """The constant of token-sum-norm (Dr.GRPO), in tokens."""
    mean_weight: float | Tensor | None = None
    """What the weights of a correction with `normalize` are divided by; `correction_counts` gives its parts."""

    @classmethod
    def from_lengths(cls, lengths: Iterable[int], length: float | None = None) -> Normalizer:
        """From the number of unmasked response tokens of every sequence of the mini-batch."""
        lengths = [int(value) for value in lengths]
        return cls(float(sum(lengths)), float(sum(value > 0 for value in lengths)), length)

    def corrected(self, counts: Tensor, *, kept: bool) -> Normalizer:
        """With what a correction counts over the mini-batch.

        Args:
            counts: [4], the sum of `correction_counts` over every micro-batch and rank.
            kept: whether only what a correction keeps is divided by (`denominator: kept`).
        """
        tokens, sequences, total, number = counts.unbind()
        mean = total / number.clamp(min=1)
        if not kept:
            return replace(self, mean_weight=mean)
        return Normalizer(tokens, sequences, self.length, mean)


def check_aggregation(mode: str) -> None:
    """Raise UserError for an unknown mode, naming the nearest."""
    if mode not in AGGREGATIONS:
        raise unknown("aggregation", mode, AGGREGATIONS, where="loss_fn.aggregation")


def sequence_scale(mode: str, normalizer: Normalizer, lengths: Tensor) -> Tensor:
    """The factor of every token of a sequence: [num_sequences].

    Args:
        mode: token-mean: 1/global tokens. seq-mean-token-sum: 1/global non-empty sequences. seq-mean-token-mean:
            1/(T_i · global non-empty sequences). token-sum-norm: 1/(global non-empty sequences · constant length).
        normalizer: global counts.
        lengths: [num_sequences], T_i over every context parallel rank.

    Raises:
        UserError: unknown mode, or token-sum-norm without its constant.
    """

    def at_least_one(count: float | Tensor) -> float | Tensor:
        return count.to(lengths.device).clamp(min=1) if isinstance(count, Tensor) else max(count, 1)

    ones = torch.ones_like(lengths)
    if mode == "token-mean":
        return ones / at_least_one(normalizer.num_tokens)
    if mode == "seq-mean-token-sum":
        return ones / at_least_one(normalizer.num_sequences)
    if mode == "seq-mean-token-mean":
        return ones / (lengths.clamp(min=1) * at_least_one(normalizer.num_sequences))
    check_aggregation(mode)
    if not normalizer.length or normalizer.length <= 0:
        raise UserError(
            f"is {normalizer.length}",
            where="loss_fn.aggregation_length",
            expected="the constant length of token-sum-norm, in tokens",
        )
    return ones / (at_least_one(normalizer.num_sequences) * normalizer.length)
