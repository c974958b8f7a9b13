"""Routes through layouts: every rank's slice together is what the engine chose, and nothing else is replayed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vespo_megatron.data.layout import SequenceLayout
from vespo_megatron.data.sample import Sample
from vespo_megatron.routing_replay.table import slice_routes

TOPK, EXPERTS, LAYERS = 2, 8, 4


@st.composite
def batches(draw):
    """Samples with routes of distinct experts, and their layout."""
    pairs = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    samples = []
    for index, (prompt, response) in enumerate(pairs):
        rows = prompt + response - 1
        routes = random.permuted(np.tile(np.arange(EXPERTS), (rows, LAYERS, 1)), axis=-1)[..., :TOPK]
        versions = np.full(response, 3)
        versions[draw(st.integers(0, response)) :] = draw(st.sampled_from([3, 4]))
        samples.append(
            Sample(
                sample_id=str(index),
                prompt_id="p",
                prompt_ids=np.ones(prompt),
                response_ids=np.ones(response),
                behavior_log_probs=np.zeros(response),
                weight_versions=versions,
                finish_reason="stop",
                routes=routes.astype(np.uint8),
                route_versions=3,
            )
        )
    layout = SequenceLayout(
        lengths=tuple(sample.num_tokens for sample in samples),
        prompt_lengths=tuple(len(sample.prompt_ids) for sample in samples),
        context_parallel_size=draw(st.sampled_from([1, 2, 4])),
        tensor_parallel_size=draw(st.sampled_from([1, 2])),
    )
    return samples, layout


@given(batches(), st.sampled_from([1, 2, 4]))
def test_the_ranks_together_replay_each_fresh_route_once_and_no_stale_one(batch, stages):
    samples, layout = batch
    per_stage = LAYERS // stages
    for stage in range(stages):
        layers = list(range(stage * per_stage, (stage + 1) * per_stage))
        replayed = []
        for rank in range(layout.context_parallel_size):
            for tensor in range(layout.tensor_parallel_size):
                here = layout.at(context_parallel_rank=rank, tensor_parallel_rank=tensor)
                table = slice_routes(samples, here, layers, topk=TOPK, num_experts=EXPERTS)
                table.check(EXPERTS, "here")
                assert len(table.experts) == layout.num_local_tokens // layout.tensor_parallel_size
                real = here.is_real[here.sequence_parallel_slice]
                replayed += [row.tobytes() for row in table.experts[table.recorded & real]]
        expected = []
        for sample in samples:
            fresh = np.concatenate(
                [np.full(len(sample.prompt_ids) - 1, sample.weight_versions[0]), sample.weight_versions]
            )
            expected += [row.tobytes() for row in np.ascontiguousarray(sample.routes[fresh == 3][:, layers])]
        assert sorted(replayed) == sorted(expected)
