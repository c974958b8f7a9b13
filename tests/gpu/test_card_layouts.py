"""Layouts of several ranks on one card compute what one process computes there."""

from __future__ import annotations

import policy_work
import pytest
import rank_work
from test_layout_parity import CP, EP, PP, SP, TP, worst
from worker_pool import WorkerPool

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(150)]
LAYOUTS = {
    "TP2": (2, {TP: 2, SP: True}),
    "EP2": (2, {EP: 2}),
    "CP2": (2, {CP: 2}),
    "PP2": (2, {PP: 2}),
    "DP2, distributed optimizer": (2, {"optimizer.use_distributed_optimizer": True}),
    "TP2·EP2·CP2": (4, {TP: 2, EP: 2, CP: 2, SP: True}),
}


@pytest.fixture(scope="module")
def ranks():
    pool = WorkerPool(deadline=100)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def one_process(checkpoint, device):
    return policy_work.everything(checkpoint[0], device)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_and_updates_are_those_of_one_process(name, ranks, checkpoint, one_process, note):
    size, layout = LAYOUTS[name]
    answers = ranks.run(rank_work.everything, size, folder=checkpoint[0], layout=layout)
    errors = {
        routes: worst(answers[0][routes]["gradients"], one_process[routes]["gradients"])
        for routes in ("live", "R2", "R3")
    }
    errors["norm"] = abs(answers[0]["grad_norm"] / one_process["grad_norm"] - 1)
    note(**errors)
    assert all(error < 1e-4 for error in errors.values()), errors
    assert worst(answers[0]["update"], one_process["update"]) < 1e-2
