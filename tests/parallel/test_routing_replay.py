"""Routing replay on live megatron-core routers: exact on every layout, and loud when something is wrong."""

from __future__ import annotations

import layout_work
import pytest
from test_layout_parity import LAYOUTS, TOLERANCE, relative_error


@pytest.fixture(scope="module")
def one_process(workers, checkpoint):
    return workers.run(layout_work.replayed_gradients, 1, folder=checkpoint[0], layout={})[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_under_replay_are_those_of_one_process(name, workers, checkpoint, one_process):
    world_size, layout = LAYOUTS[name]
    answers = workers.run(layout_work.replayed_gradients, world_size, folder=checkpoint[0], layout=layout)
    for mode in ("R2", "R3"):
        actual, expected = [answer[mode] for answer in answers], one_process[mode]
        errors = {
            "loss": abs(sum(answer["loss"] for answer in actual) / expected["loss"] - 1),
            "gradients": max(
                relative_error(actual[0]["gradients"][name], tensor)
                for name, tensor in expected["gradients"].items()
                if tensor.norm() > 0  # an expert no route names has none
            ),
        }
        print(f"{mode}, {name}: " + ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items()))
        assert max(errors.values()) <= TOLERANCE, (mode, errors)


def test_random_routes_change_the_gradient(workers, checkpoint, one_process):
    """Or the test above would prove nothing."""
    live = workers.run(layout_work.gradients_and_update, 1, folder=checkpoint[0], layout={})[0]
    name = "model.layers.3.mlp.gate.weight"
    assert relative_error(one_process["R3"]["gradients"][name], live["gradients"][name]) > 0.1


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
