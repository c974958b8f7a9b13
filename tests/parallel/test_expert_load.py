"""Expert load: what the routers' outputs say, on every layout, with live and with replayed routes."""

from __future__ import annotations

import layout_work
import numpy as np
import pytest
from test_layout_parity import LAYOUTS

from vespo_megatron.trainer.expert_load import expert_load_metrics


@pytest.fixture(scope="module", params=["live", "R3"])
def one_process(request, workers, checkpoint):
    run = {"folder": checkpoint[0], "routes": request.param}
    return run, workers.run(layout_work.expert_load, 1, layout={}, **run)[0]


def test_counts_are_those_of_the_routers_outputs_over_real_tokens(one_process):
    run, answer = one_process
    assert answer["counts"] == answer["seen"]
    tokens = sum(prompt + response for prompt, response in layout_work.LENGTHS)
    assert {sum(counts) for counts in answer["counts"].values()} == {tokens * layout_work.TOPK}
    if run["routes"] == "R3":  # but for a sequence's last token, which the engine has no route for
        samples = layout_work.with_random_routes(layout_work.ragged_batch()).samples
        for column, counts in enumerate(answer["counts"].values()):
            routes = np.concatenate([sample.routes[:, column].ravel() for sample in samples])
            more = np.array(counts) - np.bincount(routes, minlength=layout_work.NUM_EXPERTS)
            assert (more >= 0).all() and more.sum() == layout_work.TOPK * len(samples)


def test_metrics_are_the_formula(one_process):
    counts = {layer: np.array(row) for layer, row in one_process[1]["counts"].items()}
    metrics = expert_load_metrics([one_process[1]["stage"]], per_layer=True)
    violations = {layer: row.max() / row.mean() - 1 for layer, row in counts.items()}
    assert metrics["routes/max_violation"] == pytest.approx(np.mean(list(violations.values())))
    assert metrics["routes/max_violation_worst_layer"] == pytest.approx(max(violations.values()))
    for layer, row in counts.items():
        assert metrics[f"routes/max_violation_layer_{layer}"] == pytest.approx(violations[layer])
        assert metrics[f"routes/busiest_expert_share_layer_{layer}"] == pytest.approx(row.max() / row.sum())
        assert metrics[f"routes/dead_experts_layer_{layer}"] == (row == 0).sum()
    assert min(violations.values()) > 0.05, "an even load would prove little"


@pytest.mark.parametrize(
    "name", ["dp2", "tp2", "tp2_ep2", "cp2", "vpp", "tp2_pp2_cp2_ep2", "recompute", "selective_recompute"]
)
def test_every_layout_reports_one_process_load(name, workers, one_process):
    run, expected = one_process
    world_size, layout = LAYOUTS[name]
    answers = workers.run(layout_work.expert_load, world_size, layout=layout, **run)
    stages = [answer["stage"] for answer in answers]
    assert sum(bool(stage) for stage in stages) == layout.get("pipeline_model_parallel_size", 1), "one rank of a stage"
    assert expert_load_metrics(stages, per_layer=True) == expert_load_metrics([expected["stage"]], per_layer=True)
