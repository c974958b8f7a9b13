"""The invariants of `data.packing`, on random batches."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vespo_megatron.data.packing import plan_mini_batches
from vespo_megatron.errors import UserError

lengths = st.lists(st.integers(1, 200), min_size=8, max_size=80)


@given(lengths, st.integers(1, 4), st.integers(1, 4), st.integers(200, 900), st.sampled_from([1, 2]))
def test_a_plan_keeps_its_invariants(lengths, num_mini_batches, ranks, budget, round_up_to):
    try:
        plan = plan_mini_batches(
            lengths,
            num_mini_batches=num_mini_batches,
            data_parallel_size=ranks,
            token_budget=budget,
            padded_length=lambda length: -(-length // 4) * 4,
            round_up_to=round_up_to,
        )
    except UserError as error:
        # Only a mini-batch with too few sequences to give every rank its micro-batches may be refused.
        assert error.where == "policy.train_global_batch_size"
        assume(False)
    seen = []
    bounds = [len(lengths) * part // num_mini_batches for part in range(num_mini_batches + 1)]
    for number, mini_batch in enumerate(plan.mini_batches):
        members = [index for rank in mini_batch for micro_batch in rank for index in micro_batch]
        assert sorted(members) == list(range(bounds[number], bounds[number + 1]))
        seen += members
        assert len(mini_batch) == ranks
        assert len({len(rank) for rank in mini_batch}) == 1
        assert len(mini_batch[0]) % round_up_to == 0
        for rank in mini_batch:
            for micro_batch in rank:
                assert micro_batch
                assert sum(-(-lengths[index] // 4) * 4 for index in micro_batch) <= budget
    assert sorted(seen) == list(range(len(lengths)))


@given(lengths.filter(lambda lengths: len(lengths) % 4 == 0), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_without_packing_no_micro_batch_has_more_sequences_than_asked(lengths, ranks, limit):
    plan = plan_mini_batches(lengths, num_mini_batches=1, data_parallel_size=ranks, max_sequences=limit)
    assert max(len(micro_batch) for rank in plan.mini_batches[0] for micro_batch in rank) <= limit


def test_shares_are_balanced_by_the_cost_that_is_given():
    plan = plan_mini_batches(
        [100, 1, 1, 1, 1, 1, 1, 1], num_mini_batches=1, data_parallel_size=2, cost=lambda length: length**2
    )
    shares = [sorted(index for micro_batch in rank for index in micro_batch) for rank in plan.mini_batches[0]]
    assert sorted(shares, key=len) == [[0], [1, 2, 3, 4, 5, 6, 7]]


def test_a_sequence_beyond_the_budget_is_named():
    with pytest.raises(UserError, match="sequence 1 occupies 90 tokens"):
        plan_mini_batches([10, 90], num_mini_batches=1, token_budget=64)


def test_too_few_sequences_for_the_ranks_is_an_error():
    with pytest.raises(UserError, match="a mini-batch has 1 sequences"):
        plan_mini_batches([10, 20], num_mini_batches=2, data_parallel_size=2)


def test_micro_batches_of_like_work_meet():
    """Expert parallel ranks exchange tokens in each micro-batch, so the slowest of them sets the pace."""
    generator = random.Random(0)
    lengths = [min(4000, int(generator.lognormvariate(6, 1.2)) + 1) for _ in range(256)]

    def cost(length):
        return length + length**2 / 4000

    plan = plan_mini_batches(lengths, num_mini_batches=1, data_parallel_size=4, token_budget=8000, cost=cost)
    (ranks,) = plan.mini_batches
    work = [[sum(cost(lengths[index]) for index in content) for content in rank] for rank in ranks]
    for mine in work:
        assert mine == sorted(mine, reverse=True)
    paced = sum(max(step) for step in zip(*work, strict=True))
    assert paced <= 1.1 * sum(map(sum, work)) / 4
