"""Routes of responses that several weight versions drew: every row replayed, but for those of a retracted one."""

from __future__ import annotations

import numpy as np
import pytest
import span_work
import torch
from test_layout_parity import LAYOUTS, TOLERANCE, worst

from vespo_megatron.routing_replay.table import row_versions


@pytest.fixture(scope="module")
def one_process(workers, checkpoint):
    return workers.run(span_work.replay_spans, 1, folder=checkpoint[0], layout={})[0]


def test_each_token_is_routed_as_in_the_forward_that_drew_it_and_live_where_nobody_knows(one_process):
    batch, live = span_work.batch_of_spans(), 0
    for index, sample in enumerate(batch.samples):
        chosen = one_process["chosen"][sample.sample_id][:-1]  # the last token's route is nobody's
        rows = torch.zeros(chosen.shape, dtype=torch.bool)
        rows.scatter_(2, torch.from_numpy(sample.routes.astype(np.int64)), True)
        same = (rows == chosen).all(dim=2).all(dim=1).numpy()
        stale = sample.route_versions != row_versions(sample)
        assert same[~stale].all()
        assert (index == span_work.RETRACTED) == stale.any() and not same[stale].any()
        live += stale.sum()
    assert live > 20 and one_process["found"] == 1


@pytest.mark.parametrize("name", ["tp2_ep2", "pp2", "cp2"])
def test_loss_and_gradients_are_those_of_one_process_on_every_layout(name, workers, checkpoint, one_process):
    world_size, layout = LAYOUTS[name]
    answers = workers.run(span_work.replay_spans, world_size, folder=checkpoint[0], layout=layout)
    errors = {
        "loss": abs(sum(answer["loss"] for answer in answers) / one_process["loss"] - 1),
        "gradients": worst(answers[0]["gradients"], one_process["gradients"]),
    }
    print(f"{name}: " + ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items()))
    assert max(errors.values()) <= TOLERANCE, errors


def test_dropped_the_retracted_response_has_no_gradient_and_the_others_theirs(workers, checkpoint, one_process):
    dropped = workers.run(span_work.replay_spans, 1, folder=checkpoint[0], layout={}, on_stale_routes="drop")[0]
    assert dropped["found"] == 1
    assert abs(dropped["loss"] / one_process["loss"] - 1) > 0.01, "its loss is gone"
