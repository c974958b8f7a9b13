"""The invariants of `data.layout`, on random micro-batches and layouts up to a thousand ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vespo_megatron.data.layout import SequenceLayout, shape_bucket


@st.composite
def layouts(draw):
    pairs = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=8))
    return SequenceLayout(
        lengths=tuple(prompt + response for prompt, response in pairs),
        prompt_lengths=tuple(prompt for prompt, _ in pairs),
        context_parallel_size=draw(st.sampled_from([1, 2, 3, 4, 8])),
        tensor_parallel_size=draw(st.sampled_from([1, 2, 4, 8])),
        pad_to=draw(st.sampled_from([0, 64, 500])),
    )


def every_rank(layout: SequenceLayout) -> list[SequenceLayout]:
    return [layout.at(context_parallel_rank=rank) for rank in range(layout.context_parallel_size)]


def rows(layout: SequenceLayout, *trailing: int) -> list[np.ndarray]:
    """Distinct values for every real token of every sequence."""
    starts = np.concatenate([[0], np.cumsum(layout.lengths)])
    flat = np.arange(starts[-1] * int(np.prod(trailing, dtype=int))).reshape(-1, *trailing)
    return [flat[start : start + length] for start, length in zip(starts, layout.lengths, strict=False)]


@given(layouts())
def test_every_token_is_held_once_and_ranks_hold_equal_shares(layout):
    positions = [rank.positions for rank in every_rank(layout)]
    assert sorted(np.concatenate(positions)) == list(range(layout.num_global_tokens))
    assert {len(held) for held in positions} == {layout.num_local_tokens}
    assert layout.num_local_tokens % layout.tensor_parallel_size == 0
    assert layout.num_global_tokens >= layout.pad_to


@given(st.integers(1, 1 << 20))
def test_shapes_come_in_few_sizes_that_waste_little(tokens):
    size = shape_bucket(tokens)
    assert tokens <= size <= tokens * (1 + 1 / 32) and shape_bucket(size) == size
    octave = 1 << (size.bit_length() - 1)
    assert size % max(octave // 32, 1) == 0  # 32 sizes from one power of two to the next


@given(layouts())
def test_gathering_the_shards_undoes_the_zigzag(layout):
    tokens = rows(layout)
    gathered = np.concatenate([rank.token_ids(tokens) for rank in every_rank(layout)])[layout.gather_order]
    for start, row in zip(layout.cu_seqlens, tokens, strict=False):
        assert (gathered[start : start + len(row)] == row).all()


@given(layouts())
def test_positions_increase_inside_a_sequence_and_match_the_token(layout):
    tokens = [np.arange(length) for length in layout.lengths]
    for rank in every_rank(layout):
        segments = rank.segment_ids[rank.positions]
        for segment in range(len(layout.lengths)):
            inside = rank.position_ids[segments == segment]
            assert (np.diff(inside) > 0).all()
            held = rank.token_ids(tokens)[segments == segment]
            real = inside < layout.lengths[segment]
            assert (held[real] == inside[real]).all()


@given(layouts())
def test_every_response_token_is_predicted_once_from_the_token_before_it(layout):
    tokens = rows(layout)
    values = [row[prompt:] * 10 for row, prompt in zip(tokens, layout.prompt_lengths, strict=False)]
    shards = []
    for rank in every_rank(layout):
        targets = rank.targets(tokens)
        assert (rank.response_values(values) == targets * 10).all()
        assert (rank.token_ids(tokens)[rank.prediction_rows] == targets - 1).all()
        counts = np.diff(rank.response_cu_seqlens)
        assert counts.sum() == len(targets) and len(counts) == len(layout.lengths)
        starts = np.repeat(np.cumsum([0, *layout.lengths[:-1]]) + layout.prompt_lengths, counts)
        assert (rank.response_positions == targets - starts).all()
        shards.append(rank.response_values(values))
    merged = layout.merge_response_values(shards)
    assert all((actual == expected).all() for actual, expected in zip(merged, values, strict=True))


@given(layouts(), st.randoms(use_true_random=False))
def test_routes_follow_their_token_and_padding_gets_a_valid_distinct_route(layout, random):
    layers, topk = 2, 3
    routes = [row[:-1] for row in rows(layout, layers, topk)]  # the last token has none
    stale = [np.array([random.random() < 0.2 for _ in row], dtype=bool) for row in routes]
    tokens = rows(layout)
    usable = np.zeros(sum(layout.lengths), dtype=bool)
    for row, flags in zip(tokens, stale, strict=False):
        usable[row[:-1]] = ~flags
    held, asked = 0, 0
    for rank in every_rank(layout):
        ids, real = (
            rank.token_ids(tokens),
            rank.position_ids < np.array([*layout.lengths, 0])[rank.segment_ids[rank.positions]],
        )
        pieces = [
            rank.at(tensor_parallel_rank=tp).routes(routes, stale, topk) for tp in range(layout.tensor_parallel_size)
        ]
        sliced, live = (np.concatenate(part) for part in zip(*pieces, strict=False))
        expected = ids[:, None, None] * layers * topk + np.arange(layers * topk).reshape(layers, topk)
        assert (live == (real & ~usable[ids])).all(), "live: stale rows and last tokens, no padding"
        replayed = real & ~live
        assert (sliced[replayed] == expected[replayed]).all()
        assert (sliced[~replayed] == np.arange(topk)).all()
        held += int(replayed.sum())
        asked += int(live.sum())
    assert held == usable.sum() and held + asked == sum(layout.lengths)


def test_a_thousand_ranks_are_laid_out_on_one_core():
    layout = SequenceLayout((5000, 16384), (1000, 1024), context_parallel_size=128, tensor_parallel_size=8)
    held = np.concatenate([rank.positions for rank in every_rank(layout)])
    assert len(held) == layout.num_global_tokens == len(set(held.tolist()))


def test_a_prompt_longer_than_its_sequence_is_refused():
    with pytest.raises(ValueError, match="a prompt of 5 tokens in a sequence of 4"):
        SequenceLayout((4,), (5,))
