"""`SamplingMask` against lists of lists, and through every layout."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_layout import every_rank, layouts

from vespo_megatron.data.sampling_mask import SamplingMask

LISTS = st.lists(st.lists(st.integers(0, 9), unique=True, max_size=6), max_size=12)


def as_lists(sampling_mask: SamplingMask) -> list[list[int]]:
    assert sampling_mask.counts.dtype == sampling_mask.ids.dtype == np.int32 and sampling_mask.counts.sum() == len(
        sampling_mask.ids
    )
    return [part.tolist() for part in sampling_mask.lists()]


@given(LISTS, LISTS, st.randoms(use_true_random=False))
def test_parts_join_and_any_selection_is_that_of_the_lists(first, second, random):
    joined = SamplingMask.concatenate([SamplingMask.of(first), SamplingMask.of(second)])
    lists = first + second
    assert as_lists(joined) == lists
    assert joined.owners.tolist() == [index for index, each in enumerate(lists) for _ in each]
    index = [random.randrange(len(lists)) for _ in range(len(lists) * 2)]
    assert as_lists(joined.select(np.array(index, dtype=int))) == [lists[place] for place in index]
    tokens = np.array([random.randrange(10) for _ in lists], dtype=int)
    expected = [not each or token in each for each, token in zip(lists, tokens, strict=True)]
    assert joined.contains(tokens).tolist() == expected


@given(layouts(), st.randoms(use_true_random=False))
def test_a_token_meets_what_it_was_drawn_from_on_whatever_rank_predicts_it(layout, random):
    """Token 3·i of the responses is drawn from {3·i, 3·i + 1}, one of another sequence from everything."""
    lengths = np.array(layout.lengths) - np.array(layout.prompt_lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    sampling_mask = [
        SamplingMask.of([[3 * token, 3 * token + 1] for token in range(start, start + length)])
        if random.random() < 0.7
        else None
        for start, length in zip(starts, lengths, strict=False)
    ]
    values = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    truncated = [np.full(length, each is not None) for length, each in zip(lengths, sampling_mask, strict=True)]
    for rank in every_rank(layout):
        found = rank.response_sampling_mask(sampling_mask)
        if all(each is None for each in sampling_mask):
            assert found is None
            continue
        tokens = zip(rank.response_values(values), rank.response_values(truncated), strict=True)
        assert as_lists(found) == [[3 * token, 3 * token + 1] if is_truncated else [] for token, is_truncated in tokens]
