"""Random packed batches with the awkward cases in them, and ways to cut them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vespo_megatron.losses import LossInputs

LENGTHS = (5, 0, 1, 12, 7, 1, 4, 30, 3)
ALL_MASKED = 8


@dataclass
class Batch:
    """float64 tensors; `[tokens]` but for `advantages [num_sequences]`."""

    log_probs: Tensor
    behavior_log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    cu_seqlens: Tensor
    mask: Tensor
    token_advantages: Tensor
    positions: Tensor
    router_shift: Tensor

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def segment_ids(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(self.num_sequences), self.cu_seqlens.diff())

    @property
    def unmasked_lengths(self) -> list[int]:
        return torch.zeros(self.num_sequences).index_add_(0, self.segment_ids, self.mask.float()).int().tolist()

    def leaf(self) -> Tensor:
        return self.log_probs.clone().requires_grad_()


def apart(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Two log-probs, none above 0, with this difference: shapes as given."""
    return log_ratio.clamp(max=0.0), -log_ratio.clamp(min=0.0)


def exact_log(value: float) -> float:
    """x with exp(x) == value to the last bit, or value's logarithm where there is none."""
    x = torch.tensor(value, dtype=torch.float64).log()
    for direction in (torch.inf, -torch.inf):
        y = x.clone()
        for _ in range(8):
            if y.exp() == value:
                return float(y)
            y = torch.nextafter(y, torch.tensor(direction, dtype=torch.float64))
    return float(x)


BOUNDARIES = [exact_log(value) for value in (1 + 0.2, 1 - 0.2, 1 + 0.28, 1 + 0.27, 1 + 0.25, 3.0, 1.0, 0.6, 5.0)]


def make_batch(
    seed: int = 0, lengths: tuple[int, ...] = LENGTHS, scale: float = 0.3, probabilities: bool = False
) -> Batch:
    """Masked tokens hold NaN; some ratios are exactly on a clip bound; there are empty and one-token responses.

    `probabilities` keeps every log-prob below 0, and gives up exactness.
    """
    generator = torch.Generator().manual_seed(seed)
    num = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_probs = -normal(num).abs() - 0.05
    behavior = (log_probs - scale * normal(num)).clamp(max=-0.01)
    old = (behavior + 0.1 * normal(num)).clamp(max=0.0)
    mask = torch.rand(num, generator=generator) > 0.25
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    segment = torch.repeat_interleave(torch.arange(len(lengths)), cu.diff())
    positions = torch.arange(num) - cu[segment]
    if len(lengths) == len(LENGTHS):
        mask[segment == ALL_MASKED] = False
        for single in (2, 5):
            mask[cu[single]] = True
        # Exact bounds: one of the two is 0, so that the difference is the logarithm itself, unless probabilities below
        # one are asked for. One-token responses put sequence-level ratios on a bound too.
        spots = [int(cu[2]), int(cu[5]), *range(int(cu[7]), int(cu[7]) + len(BOUNDARIES))]
        for spot, value in zip(spots, [exact_log(1.25), exact_log(1 - 0.2), *BOUNDARIES], strict=True):
            base = -2.0 if probabilities else min(0.0, -value)
            log_probs[spot], behavior[spot], old[spot], mask[spot] = base + value, base, base, True
    advantages, token_advantages = normal(len(lengths)), normal(num)
    shift = 0.7 + 0.3 * torch.rand(num, generator=generator, dtype=torch.float64)
    batch = Batch(log_probs, behavior, old, advantages, cu, mask, token_advantages, positions, shift)
    if len(lengths) == len(LENGTHS):
        batch.advantages[2], batch.advantages[5] = 1.0, -1.0
    floats = (batch.log_probs, batch.behavior_log_probs, batch.old_log_probs, batch.token_advantages, shift)
    for tensor in floats:
        tensor[~mask] = torch.nan
    return batch


def loss_inputs(batch: Batch, log_probs: Tensor, *, per_token: bool = False, **changes: Any) -> LossInputs:
    """The batch as the loss takes it, every input given; `per_token` advantages; `changes` of `LossInputs`' fields."""
    inputs = LossInputs(
        log_probs,
        batch.behavior_log_probs,
        batch.token_advantages if per_token else batch.advantages,
        batch.cu_seqlens,
        mask=batch.mask,
        old_log_probs=batch.old_log_probs,
        ref_log_probs=batch.old_log_probs,
        router_shift=batch.router_shift,
        positions=batch.positions,
        advantage_level="token" if per_token else "sequence",
    )
    return replace(inputs, **changes)


def select_tokens(batch: Batch, tokens: list[Tensor]) -> Batch:
    """The batch with only `tokens[i]` (indices into the packed tokens) of each sequence i."""
    index = torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.long)
    cu = torch.tensor([0, *torch.tensor([len(t) for t in tokens]).cumsum(0).tolist()])
    return replace(
        batch,
        log_probs=batch.log_probs[index],
        behavior_log_probs=batch.behavior_log_probs[index],
        old_log_probs=batch.old_log_probs[index],
        mask=batch.mask[index],
        token_advantages=batch.token_advantages[index],
        positions=batch.positions[index],
        router_shift=batch.router_shift[index],
        cu_seqlens=cu,
    )


def select_sequences(batch: Batch, numbers: list[int]) -> tuple[Batch, Tensor]:
    """The batch of some sequences in the given order, and where its tokens were."""
    cu = batch.cu_seqlens
    tokens = [torch.arange(int(cu[i]), int(cu[i + 1])) for i in numbers]
    part = select_tokens(batch, tokens)
    part.advantages = batch.advantages[numbers]
    return part, torch.cat(tokens)


def zigzag(batch: Batch, rank: int, size: int) -> tuple[Batch, Tensor]:
    """This context parallel rank's piece (chunks rank and 2·size−1−rank of each sequence), and where it was."""
    cu = batch.cu_seqlens.tolist()
    tokens = []
    for start, stop in pairwise(cu):
        width = -(-(stop - start) // (2 * size))
        index = torch.arange(start, stop)
        chunks = [index[c * width : (c + 1) * width] for c in (rank, 2 * size - 1 - rank)]
        tokens.append(torch.cat(chunks))
    return select_tokens(batch, tokens), torch.cat(tokens)
