"""Cut a rollout batch into mini-batches, data parallel shares and micro-batches. Pure Python.

Invariants of a plan, which `tests/data/test_packing.py` asserts:
  1. every index is in exactly one micro-batch;
  2. mini-batch m holds the m-th consecutive part of the batch (whole groups, when the caller ordered them so), and
     sizes of mini-batches differ by at most one;
  3. within a mini-batch every data parallel rank has the same number of micro-batches, none of them empty;
  4. no micro-batch exceeds the token budget, or the number of sequences, that was given;
  5. the number of micro-batches is a multiple of `round_up_to`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vespo_megatron.errors import UserError

Cost = Callable[[int], float]


@dataclass(frozen=True)
class StepPlan:
    """`mini_batches[m][rank][k]` is a list of indices into the rollout batch: one micro-batch."""

    mini_batches: list[list[list[list[int]]]]


def plan_mini_batches(
    lengths: Sequence[int],
    *,
    num_mini_batches: int,
    data_parallel_size: int = 1,
    token_budget: int | None = None,
    max_sequences: int | None = None,
    padded_length: Callable[[int], int] = lambda length: length,
    cost: Cost | None = None,
    round_up_to: int = 1,
) -> StepPlan:
    """Plan one rollout batch.

    Args:
        lengths: real tokens of each sequence.
        num_mini_batches: N, the optimizer updates the batch is cut into.
        data_parallel_size: shares per mini-batch.
        token_budget: padded tokens of a micro-batch at most (of the whole context parallel group).
        max_sequences: sequences of a micro-batch at most.
        padded_length: what a sequence occupies once padded.
        cost: work of a sequence, by which shares and micro-batches are balanced; tokens when not given.
        round_up_to: the number of micro-batches becomes a multiple of this (virtual pipelines want one of PP).

    Raises:
        UserError: a sequence longer than the budget, or too few sequences for every rank to have one.
    """
    sizes = [padded_length(length) for length in lengths]
    work = [cost(length) for length in lengths] if cost else [float(size) for size in sizes]
    if token_budget is not None and sizes and max(sizes) > token_budget:
        longest = max(range(len(sizes)), key=sizes.__getitem__)
        raise UserError(
            f"sequence {longest} occupies {sizes[longest]} tokens",
            where="policy.sequence_packing.train_mb_tokens",
            expected=f"at most {token_budget}",
            fix="raise the token budget, or lower policy.max_total_sequence_length",
        )
    plans = []
    for members in _consecutive_parts(len(lengths), num_mini_batches):
        needed = data_parallel_size * round_up_to
        if len(members) < needed:
            raise UserError(
                f"a mini-batch has {len(members)} sequences",
                where="policy.train_global_batch_size",
                expected=f"at least {needed}: one for every micro-batch of every data parallel rank",
                fix="enlarge the mini-batch or use fewer data parallel ranks",
            )
        plans.append(_plan_one(members, sizes, work, data_parallel_size, token_budget, max_sequences, round_up_to))
    return StepPlan(plans)


def _consecutive_parts(total: int, parts: int) -> list[list[int]]:
    bounds = [total * part // parts for part in range(parts + 1)]
    return [list(range(start, end)) for start, end in itertools.pairwise(bounds)]


def _plan_one(
    members: Sequence[int],
    sizes: Sequence[int],
    work: Sequence[float],
    data_parallel_size: int,
    token_budget: int | None,
    max_sequences: int | None,
    round_up_to: int,
) -> list[list[list[int]]]:
    shares = _balance(members, work, data_parallel_size)
    packed = [_first_fit(share, sizes, token_budget, max_sequences) for share in shares]
    count = max(len(bins) for bins in packed)
    count = -(-count // round_up_to) * round_up_to
    if count > min(len(share) for share in shares):
        # More micro-batches than the smallest share has sequences: only then may a balanced share be too uneven.
        shares = _balance_counts(members, work, data_parallel_size)
        packed = [_first_fit(share, sizes, token_budget, max_sequences) for share in shares]
        count = -(-max(len(bins) for bins in packed) // round_up_to) * round_up_to
        if count > min(len(share) for share in shares):
            raise UserError(
                f"a data parallel share of {min(map(len, shares))} sequences cannot fill {count} micro-batches",
                where="policy.train_global_batch_size",
                expected="more sequences per mini-batch, or a larger token budget",
            )
    return [_heaviest_first(_split_until(bins, count, work), work) for bins in packed]


def _heaviest_first(bins: list[list[int]], work: Sequence[float]) -> list[list[int]]:
    """Ranks that exchange tokens in every micro-batch (expert parallel ones) wait for the slowest: like meets like."""
    return sorted(bins, key=lambda content: (-sum(work[index] for index in content), content))


def _balance(members: Sequence[int], work: Sequence[float], parts: int) -> list[list[int]]:
    """Longest first, each to the lightest part (at most 4/3 of the best balance)."""
    heap = [(0.0, 0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(members, key=lambda index: (-work[index], index)):
        load, count, part = heapq.heappop(heap)
        shares[part].append(index)
        heapq.heappush(heap, (load + work[index], count + 1, part))
    return shares


def _balance_counts(members: Sequence[int], work: Sequence[float], parts: int) -> list[list[int]]:
    """As `_balance`, but shares differ by at most one in the number of sequences: longest first, back and forth."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    order = sorted(members, key=lambda index: (-work[index], index))
    for row, start in enumerate(range(0, len(order), parts)):
        group = order[start : start + parts]
        for offset, index in enumerate(group):
            shares[offset if row % 2 == 0 else parts - 1 - offset].append(index)
    return shares


def _first_fit(
    share: Sequence[int], sizes: Sequence[int], token_budget: int | None, max_sequences: int | None
) -> list[list[int]]:
    """First-fit decreasing: close to the fewest micro-batches that keep the limits."""
    bins: list[list[int]] = []
    filled: list[int] = []
    for index in sorted(share, key=lambda index: (-sizes[index], index)):
        for number, content in enumerate(bins):
            fits = token_budget is None or filled[number] + sizes[index] <= token_budget
            if fits and (max_sequences is None or len(content) < max_sequences):
                content.append(index)
                filled[number] += sizes[index]
                break
        else:
            bins.append([index])
            filled.append(sizes[index])
    return bins


def _split_until(bins: list[list[int]], count: int, work: Sequence[float]) -> list[list[int]]:
    """Split the heaviest micro-batch that has two sequences until there are `count`."""
    bins = [list(content) for content in bins]
    while len(bins) < count:
        heaviest = max(
            (number for number, content in enumerate(bins) if len(content) > 1),
            key=lambda number: (sum(work[index] for index in bins[number]), -number),
        )
        halves = _balance(bins[heaviest], work, 2)
        bins[heaviest] = halves[0]
        bins.append(halves[1])
    return [sorted(content) for content in bins]
