"""Routing replay on live megatron-core routers; `test_layout_parity` has its gradients on every layout."""

from __future__ import annotations

import layout_work
import pytest
from test_layout_parity import LAYOUTS


@pytest.mark.parametrize("name", ["one", "tp2_sp", "cp2", "vpp", "tp2_ep2"])
def test_at_theta_old_replay_is_the_identity_to_the_last_bit(name, workers, checkpoint):
    world_size, layout = LAYOUTS.get(name, (1, {}))
    answers = workers.run(layout_work.replay_at_theta_old, world_size, folder=checkpoint[0], layout=layout)
    assert {answer for answer in answers if answer is not None} == {True}


def test_after_an_update_choices_stay_and_gates_follow(workers, checkpoint):
    seen = workers.run(layout_work.routers_after_an_update, 1, folder=checkpoint[0], layout={})[0]
    assert seen["layers"] == [1, 3, 4], "layer 2 is dense"
    assert seen["replayed_is_recorded"]
    assert seen["live_moved"], "the update was large enough to flip routes"
    assert seen["gates_moved"]
    assert all(0 < norm < float("inf") for norm in seen["gradient_norms"])


def test_the_router_gradient_is_that_of_the_dense_formula(workers, checkpoint):
    """Logits in float64; megatron-core's softmax of them is float32 (moe_utils.py:714), hence not to 1e-12."""
    errors = workers.run(layout_work.router_gradient, 1, folder=checkpoint[0], layout={})[0]
    assert errors["gates"] < 1e-6 and errors["gradient"] < 1e-5 and errors["norm"] > 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("orphan", "layer 1 used 0 route tables forward"),
        ("twice", "layer 1 used 8 route tables forward"),
        ("rows", "the rows of its route table"),
        ("missing", "has no routes"),
    ],
)
@pytest.mark.parametrize("granularity", [None, "full"], ids=["", "recompute"])
def test_a_fault_is_an_error_and_leaves_no_state_behind(fault, message, granularity, workers, checkpoint):
    layout = {"recompute_granularity": granularity}
    assert message in workers.run(layout_work.broken_replay, 1, folder=checkpoint[0], layout=layout, fault=fault)[0]


def test_a_frozen_router_stays_and_everything_else_is_trained(workers, checkpoint):
    layout = LAYOUTS["tp2_ep2"][1]
    changes = workers.run(layout_work.change_with_a_frozen_router, 2, folder=checkpoint[0], layout=layout)[0]
    routers = {name for name in changes if name.endswith("mlp.gate.weight")}
    assert len(routers) == 3
    assert {name for name, change in changes.items() if change == 0} == routers
