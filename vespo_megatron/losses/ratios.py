"""Importance ratios of one micro-batch, per token and per sequence: all that an objective may look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.lazy import lazy
from vespo_megatron.losses.one_line import OneLine
from vespo_megatron.losses.sequence import PackedSequences

LOG_RATIO_CLAMP = 20.0
"""Bound of one token's log-ratio, and of log W where a metric exponentiates it."""


@dataclass(frozen=True, repr=False)
class Ratios(OneLine):
    """What an objective may look at; every tensor is detached, in float32 or float64.

    "Anchor" is the policy the ratio is taken against: μ (behaviour `rollout`) or π_old (the others), unless the
    objective asks for one of them by name. A token's log-ratio is clamped to ±20, and 0 where masked; S is the sum of
    what it is before.
    """

    sequences: PackedSequences
    mask: Tensor | None
    """bool [tokens]; None: every token counts."""
    sequence_log_ratio: Tensor
    """[num_sequences]: S, the sum of log π_θ − log π_anchor over the whole response (every context parallel rank)."""
    clamped_sequence_log_ratio: Tensor
    """[num_sequences]: the same with every token clamped to ±20, as VESPO's reference has it. A response of one token
    at −50 and one at +25 has W = 1 here, and e^−25 in S."""
    lengths: Tensor
    """[num_sequences]: T, tokens in that sum, over every context parallel rank."""
    advantage: Tensor
    """[num_sequences] or [tokens], as given."""
    sequence_advantage: Tensor
    """[num_sequences]: the mean over unmasked tokens where advantages came per token."""
    per_token_advantage: bool
    log_probs: Tensor
    """[tokens]: log π_θ."""
    behavior_log_probs: Tensor
    """[tokens]: log μ."""
    old_log_probs: Tensor | None = None
    """[tokens]: log π_old; None in behaviour mode `rollout`."""
    positions: Tensor | None = None
    """int64 [tokens]: index of each token in its whole response; None: as packed here."""
    entropy: Tensor | None = None
    """[tokens]: of the policy's own distribution; None where nothing asks for it."""
    bad: Tensor | None = None
    """bool [num_sequences]: a number of the sequence is not finite; for what looks at several sequences. None: none."""
    corrected_log_ratio: Tensor | None = None
    """[tokens]: the log-ratio with what weighs it before the clip (a correction, the router shift); None: nothing."""

    @lazy
    def log_ratio(self) -> Tensor:
        """[tokens]: log π_θ − log π_anchor, made only for objectives that look at tokens."""
        if self.corrected_log_ratio is not None:
            return self.corrected_log_ratio
        difference = self.masked(self.log_probs - self.anchor_log_probs)
        return difference.clamp_(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)

    @lazy
    def token_advantage(self) -> Tensor:
        """[tokens]"""
        return self.advantage if self.per_token_advantage else self.sequences.expand(self.advantage)

    @property
    def anchor_log_probs(self) -> Tensor:
        """[tokens]: π_old where it is known, else μ."""
        return self.behavior_log_probs if self.old_log_probs is None else self.old_log_probs

    @lazy
    def safe_lengths(self) -> Tensor:
        """[num_sequences]: T, at least 1, to divide by."""
        return self.lengths.clamp(min=1)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[num_sequences]: the sum of `values [tokens]` over each whole response; an all-reduce of its own."""
        return self.sequences.all_reduce(self.sequences.local_sum(self.masked(values)))

    def counted(self, values: Tensor) -> Tensor:
        """`values [tokens]`, 0 where masked and in bad sequences: what may be summed over sequences."""
        values = self.masked(values)
        return values if self.bad is None else torch.where(self.sequences.expand(self.bad), 0.0, values)

    def masked(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """`values [tokens]` with masked tokens replaced."""
        return values if self.mask is None else torch.where(self.mask, values, fill)

    def prefix_min_log_ratio(self) -> Tensor:
        """[tokens]: min over the *preceding* unmasked tokens of the response of log ρ; 0 for the first.

        Puts the responses in a [num_sequences, longest] matrix by position and, under context parallelism, adds the
        ranks' matrices: a token-sized collective and one wait of the host, paid only by objectives that call this.
        """
        packed = self.sequences
        if self.positions is None:
            if packed.group is not None:
                raise UserError(
                    "this objective looks at preceding tokens, which other context parallel ranks hold",
                    where="positions",
                    expected="the index of each token in its whole response",
                    fix="pass positions [tokens]",
                )
            positions = torch.arange(packed.num_tokens, device=packed.device) - packed.offsets[packed.segment_ids]
        else:
            positions = self.positions
        longest = torch.zeros(1, dtype=torch.int64, device=packed.device)
        if packed.num_tokens:
            longest = (positions.max() + 1).reshape(1)
        if packed.group is not None:
            torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX, group=packed.group)
        width = int(longest)
        if width == 0:
            return self.log_ratio
        absent = torch.finfo(self.log_ratio.dtype).max
        matrix = self.log_ratio.new_zeros(packed.num_sequences, width)
        present = torch.zeros_like(matrix)
        rows = packed.segment_ids
        matrix[rows, positions] = self.log_ratio
        present[rows, positions] = 1.0 if self.mask is None else self.mask.to(matrix.dtype)
        if packed.group is not None:
            packed.all_reduce(matrix)
            packed.all_reduce(present)
        matrix = torch.where(present > 0, matrix, absent)
        preceding = torch.full_like(matrix, absent)
        preceding[:, 1:] = matrix.cummin(dim=1).values[:, :-1]
        preceding = torch.where(preceding == absent, 0.0, preceding)
        return preceding[rows, positions]
