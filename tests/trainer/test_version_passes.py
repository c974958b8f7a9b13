"""Which micro-batches are scored under which weight version: all that need it, and the same on every rank."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vespo_megatron.trainer.version_passes import plan_version_passes

MICRO_BATCH = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=3)


def batch(name, versions):
    samples = [
        SimpleNamespace(sample_id=f"{name}.{index}", weight_versions=np.array(each))
        for index, each in enumerate(versions)
    ]
    return SimpleNamespace(samples=samples)


@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_every_token_is_scored_once_under_its_version_and_no_pass_is_for_nothing(data, ranks, minis, multiple, times):
    size = multiple * times
    drawn = [[[data.draw(MICRO_BATCH) for _ in range(size)] for _ in range(minis)] for _ in range(ranks)]
    shards = [
        [[batch(f"{r}.{m}.{i}", each) for i, each in enumerate(mini)] for m, mini in enumerate(rank)]
        for r, rank in enumerate(drawn)
    ]
    passes = plan_version_passes(shards, multiple_of=multiple)
    everything = {v for rank in drawn for mini in rank for micro in mini for one in micro for v in one}
    assert [each.version for each in passes] == sorted(everything, reverse=True)
    for each in passes:
        for mini, chosen in enumerate(each.micro_batches):
            needed = {
                index
                for rank in drawn
                for index, micro in enumerate(rank[mini])
                if any(each.version in one for one in micro)
            }
            assert needed <= set(chosen) and len(chosen) == len(set(chosen)) <= size
            assert len(chosen) % multiple == 0 and len(chosen) - len(needed) < multiple
        rank, mini, micro, index = map(int, each.sample_id.split("."))
        assert each.version in drawn[rank][mini][micro][index]
