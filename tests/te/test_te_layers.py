"""A policy of Transformer Engine's layers computes what the native one computes, in every layout."""

from __future__ import annotations

import layout_work
import pytest
import te_work
import torch
from safetensors.torch import load_file
from test_layout_parity import CP, EP, ETP, PP, SP, TP, VPP, worst

pytestmark = pytest.mark.parallel

LAYOUTS = {
    "one": (1, {}),
    "one by one": (1, {"moe_grouped_gemm": False}),
    "recompute": (1, {"recompute_granularity": "full"}),
    "dp2": (2, {}),
    "tp2": (2, {TP: 2}),
    "tp2_sp": (2, {TP: 2, SP: True}),
    "tp2_sp_etp2": (2, {TP: 2, SP: True, ETP: 2}),
    "tp2_sp_etp2 one by one": (2, {TP: 2, SP: True, ETP: 2, "moe_grouped_gemm": False}),
    "tp2_ep2": (2, {TP: 2, EP: 2, SP: True}),
    "tp2_ep2 without sp": (2, {TP: 2, EP: 2}),
    "ep2": (2, {EP: 2}),
    "cp2": (2, {CP: 2}),
    "selective_recompute": (2, {CP: 2, "recompute_granularity": "selective"}),
    "pp2": (2, {PP: 2}),
    "vpp": (2, {PP: 2, VPP: 2}),
    "tp2_cp2": (4, {TP: 2, CP: 2, SP: True}),
    "pp2_cp2_ep2": (4, {PP: 2, CP: 2, EP: 2}),
    "fused rotary embedding": (2, {CP: 2, "apply_rope_fusion": True}),
    "fused permutation": (2, {EP: 2, "moe_permute_fusion": True}),
    "fused permutation, tp2": (2, {TP: 2, "moe_permute_fusion": True}),
    "whole optimizer": (2, {EP: 2, "optimizer.use_distributed_optimizer": False}),
}
BY_NIGHT = {
    "one by one",
    "dp2",
    "tp2_sp",
    "tp2_sp_etp2 one by one",
    "tp2_ep2",
    "selective_recompute",
    "vpp",
    "tp2_cp2",
    "pp2_cp2_ep2",
    "fused permutation, tp2",
}
"""What the others have between them."""
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def native(plain_workers, checkpoint):
    return plain_workers.run(layout_work.everything, 1, folder=checkpoint, layout={})[0]


def in_their_time():
    return [pytest.param(name, marks=[pytest.mark.nightly] * (name in BY_NIGHT)) for name in LAYOUTS]


@pytest.fixture(scope="module", params=in_their_time())
def answers(request, te_workers, checkpoint):
    world_size, layout = LAYOUTS[request.param]
    return te_workers.run(
        te_work.with_layers, world_size, layers="te", work=layout_work.everything, folder=checkpoint, layout=layout
    )


def test_hugging_face_weights_come_back_as_they_went(answers, checkpoint):
    original = load_file(f"{checkpoint}/model.safetensors")
    assert answers[0]["loaded"].keys() == original.keys()
    assert all((answers[0]["loaded"][name] == tensor).all() for name, tensor in original.items())


def test_loss_gradients_replay_and_update_are_those_of_native_layers(answers, native):
    for routes in ("live", "R2", "R3"):
        loss = sum(answer[routes]["loss"] for answer in answers) / native[routes]["loss"] - 1
        error = worst(answers[0][routes]["gradients"], native[routes]["gradients"])
        assert max(abs(loss), error) < TOLERANCE, (routes, loss, error)
    assert worst(answers[0]["update"], native["update"]) < TOLERANCE
    assert abs(answers[0]["grad_norm"] / native["grad_norm"] - 1) < TOLERANCE


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.02), ("float16", 0.003)])
def test_in_16_bits_log_probs_and_gradients_are_near_those_of_native_layers(
    precision, bound, te_workers, plain_workers, checkpoint
):
    run = {"work": te_work.in_16_bits, "folder": checkpoint, "layout": {}, "precision": precision}
    log_probs, norm = te_workers.run(te_work.with_layers, 1, layers="te", **run)[0]
    expected, expected_norm = plain_workers.run(te_work.with_layers, 1, layers="native", **run)[0]
    errors = torch.cat([(ours - theirs)[0].abs() for ours, theirs in zip(log_probs, expected, strict=True)])
    assert errors.median() < bound and abs(norm / expected_norm - 1) < 0.05, (errors.median(), norm, expected_norm)
