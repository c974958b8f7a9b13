"""Route tables: compact, checked, and never stale unseen."""

from __future__ import annotations

import numpy as np
import pytest

from vespo_megatron.data.layout import SequenceLayout
from vespo_megatron.data.sample import UNKNOWN_VERSION, Sample
from vespo_megatron.errors import UserError
from vespo_megatron.routing_replay.agreement import Agreement
from vespo_megatron.routing_replay.table import RouteTable, apply_stale_policy, row_versions, slice_routes, stale_rows


def sample(routes=True, versions=(0, 0, 0, 0), route_versions=0, **changes) -> Sample:
    """Three prompt tokens, four response tokens, two MoE layers, experts 0…3 of 8."""
    values = np.tile(np.arange(4, dtype=np.uint8), (6, 2, 1)) if routes else None
    return Sample(
        sample_id="s",
        prompt_id="p",
        prompt_ids=[1, 2, 3],
        response_ids=[4, 5, 6, 7],
        behavior_log_probs=np.zeros(4),
        weight_versions=versions,
        finish_reason="stop",
        routes=values,
        route_versions=route_versions,
        **changes,
    )


def table(samples, layers=(0, 1), topk=4) -> RouteTable:
    return slice_routes(samples, SequenceLayout.of_samples(samples), layers, topk=topk, num_experts=8)


def test_a_table_takes_a_byte_per_route_and_little_else():
    samples = [sample() for _ in range(50)]
    held = table(samples)
    routes = sum(s.num_tokens for s in samples) * 2 * 4
    assert held.experts.nbytes == routes
    longer = RouteTable(
        np.zeros((4096, 48, 8), np.uint8), np.arange(4, dtype=np.int32)
    )  # four sequences at 30B's shape
    assert longer.nbytes <= 1.05 * 4096 * 48 * 8


def test_a_rank_gets_its_own_layers():
    one = sample()
    one.routes = one.routes.copy()
    one.routes[:, 1] += 4
    assert (table([one], layers=(1,)).experts[:6, 0] == [4, 5, 6, 7]).all()


def test_the_last_token_is_left_to_the_router():
    assert table([sample(), sample()]).live_rows.tolist() == [6, 13]


def test_experts_out_of_range_or_named_twice_are_refused():
    bad = table([sample()])
    bad.experts[2, 1, 3] = 8
    with pytest.raises(UserError, match="names expert 8"):
        bad.check(8, "rank 0")
    bad.experts[2, 1, 3] = 0
    with pytest.raises(UserError, match=r"rank 0: .*names an expert twice: \[0, 1, 2, 0\]"):
        bad.check(8, "rank 0")
    bad.experts[2, 1, 3] = 3
    bad.check(8, "rank 0")


def test_missing_routes_name_the_flag():
    with pytest.raises(UserError, match="enable_return_routed_experts=true"):
        table([sample(routes=False)])


def test_routes_of_another_model_are_refused():
    with pytest.raises(UserError, match="serves another model"):
        table([sample()], topk=2)
    with pytest.raises(UserError, match="at least 4 layers"):
        table([sample()], layers=(3,))


def test_routes_of_other_weights_than_the_log_probs_are_seen():
    """An abort and retry under new weights: two tokens by version 3, two by version 4, routes all of version 4."""
    mixed = sample(versions=(3, 3, 4, 4), route_versions=4)
    assert stale_rows(mixed).tolist() == [True, True, True, True, False, False]
    assert not stale_rows(sample()).any()


def test_stale_routes_are_left_live_dropped_or_an_error_but_never_replayed():
    mixed = sample(versions=(3, 3, 4, 4), route_versions=4)
    assert apply_stale_policy([mixed, sample()], "live") == 1
    held = table([mixed])
    assert held.live_rows.tolist() == [0, 1, 2, 3, 6]
    with pytest.raises(UserError, match=r"sample s: has routes of weight version 4 and log-probs of versions \[3, 4\]"):
        apply_stale_policy([mixed], "error")
    assert apply_stale_policy([mixed], "drop") == 1 and not mixed.loss_mask.any()


def test_rows_of_several_versions_are_replayed_where_each_is_of_its_token_s():
    """A response that went on under new weights: rows of each span by the weights that drew it, none stale."""
    spans = sample(versions=(3, 3, 4, 4), route_versions=[3, 3, 3, 3, 4, 4])
    assert not stale_rows(spans).any() and apply_stale_policy([spans], "error") == 0
    assert table([spans]).live_rows.tolist() == [6]


def test_rows_of_unknown_weights_are_stale_and_no_others():
    retracted = sample(versions=(3, 3, 4, 4), route_versions=[UNKNOWN_VERSION] * 4 + [4, 4])
    with pytest.raises(UserError, match=r"has routes of weights that nobody knows and log-probs of versions \[3, 4\]"):
        apply_stale_policy([sample(), retracted], "error")
    assert apply_stale_policy([sample(), retracted], "live") == 1
    assert table([retracted]).live_rows.tolist() == [0, 1, 2, 3, 6] and retracted.loss_mask.all()
    assert apply_stale_policy([sample(), retracted], "drop") == 1 and not retracted.loss_mask.any()


def test_one_version_is_every_row_s_and_another_number_of_them_is_refused():
    assert sample(route_versions=5).route_versions.tolist() == [5] * 6
    with pytest.raises(UserError, match="has 5 route_versions"):
        sample(route_versions=[1] * 5)
    with pytest.raises(UserError, match="has routes of no weight version"):
        sample(route_versions=None)


def test_agreement_counts_sets_not_order():
    a = np.array([[[0, 1], [2, 3]], [[0, 1], [2, 3]]])
    b = np.array([[[1, 0], [2, 4]], [[0, 1], [3, 2]]])
    agreement = Agreement()
    agreement.add_tokens(agreement.add([1, 3], a, b))
    assert Agreement.sum([agreement, agreement]).metrics("routes/") == {
        "routes/agreement": 0.875,
        "routes/differing_tokens": 0.5,
        "routes/agreement_layer_1": 1.0,
        "routes/agreement_layer_3": 0.75,
    }


@pytest.mark.parametrize("on_stale_routes", ["live", "drop", "error"])
def test_a_response_of_no_token_is_routed_live_and_is_not_stale(on_stale_routes):
    """An engine that was interrupted before its first token gives neither tokens nor routes."""
    empty = Sample("e", "p", [1, 2, 3], [], [], [], "abort")
    assert row_versions(empty).tolist() == [-1, -1]
    assert apply_stale_policy([sample(), empty], on_stale_routes) == 0
    held = table([empty, sample()])
    assert held.live_rows.tolist() == [0, 1, 2, 9]
    held.check(8, "here")
