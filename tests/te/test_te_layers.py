"""A policy of Transformer Engine's layers computes what the native one computes, in every layout."""

from __future__ import annotations

import layout_work
import pytest
import te_work

TP, SP, CP, EP, ETP, PP, VPP = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {TP: 2}),
    "tp2_sp": (2, {TP: 2, SP: True}),
}


@pytest.fixture(scope="module")
def native(plain_workers, checkpoint):
    return plain_workers.run(layout_work.everything, 1, folder=checkpoint, layout={})[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_everything(name, te_workers, checkpoint, native):
    from test_layout_parity import worst
    world_size, layout = LAYOUTS[name]
    answers = te_workers.run(
        te_work.with_layers, world_size, layers="te", work=layout_work.everything, folder=checkpoint, layout=layout
    )
    for kind in ("live", "R2", "R3"):
        print(kind, sum(a[kind]["loss"] for a in answers) / native[kind]["loss"] - 1, worst(answers[0][kind]["gradients"], native[kind]["gradients"]))
    print(worst(answers[0]["update"], native["update"]))
