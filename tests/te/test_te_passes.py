"""What else a pass does with the layers, alike with Transformer Engine's and native ones."""

from __future__ import annotations

import layout_work
import precision_flow_work
import pytest
import router_shift_work
import te_work
import torch
from test_layout_parity import EP, SP, TP, worst

pytestmark = pytest.mark.parallel
LAYOUT = {TP: 2, EP: 2, SP: True}


@pytest.fixture(scope="module")
def both(te_workers, plain_workers, checkpoint):
    """Rank 0's answers of work with layers of either kind, in one layout of two ranks."""

    def run(work, layout=None, **arguments):
        arguments |= {"work": work, "folder": checkpoint, "layout": LAYOUT | (layout or {})}
        return (
            te_workers.run(te_work.with_layers, 2, layers="te", **arguments)[0],
            plain_workers.run(te_work.with_layers, 2, layers="native", **arguments)[0],
        )

    return run


def test_weights_rounded_for_a_pass_and_brought_back(both):
    flow = {"scheme": "int4", "group_size": 24}
    te, native = both(precision_flow_work.in_use, flow=flow, precision="float32")
    for ours, theirs in zip(te, native, strict=True):  # in the pass, after it
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_losses_of_the_routers_own(both):
    keys = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.02}
    te, native = both(layout_work.router_losses, keys, count=4)
    assert worst(te["gradients"], native["gradients"]) < 1e-4


def test_the_experts_load_under_replayed_routes(both):
    te, native = both(layout_work.expert_load, routes="R3")
    assert te["counts"] == native["counts"]


def test_the_routers_shift_since_the_old_policy(both):
    te, native = both(router_shift_work.two_updates)
    for ours, theirs in zip(te["gamma"], native["gamma"], strict=True):
        for (_, _, found), (_, _, expected) in zip(ours, theirs, strict=True):
            assert abs(found - expected).max() < 1e-4
