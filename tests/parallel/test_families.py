"""Every family of models: transformers' numbers on one process, and one process's in every layout."""

from __future__ import annotations

import layout_work
import numpy as np
import pytest
import torch
from family_checkpoints import FAMILIES, make_family
from test_layout_parity import EP, ETP, LAYOUTS, TOLERANCE, worst

from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.rollout_sglang.in_process.model import weight_views

QUICK = ("tp2_sp", "tp2_pp2_cp2_ep2", "pp2_cp2_ep2")
EP_OF_DENSE = (EP, ETP)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, workers):
    """(folder, transformers' model, one process's answers)."""
    folder = str(tmp_path_factory.mktemp(request.param))
    model = make_family(folder, request.param)
    return folder, model, workers.run(layout_work.everything, 1, folder=folder, layout={})[0]


def layout_for(folder: str, name: str):
    """(processes, layout): for a model without routers the layout without expert parallelism."""
    world, layout = LAYOUTS[name]
    if not read_shape(folder).num_moe_layers:
        layout = {key: value for key, value in layout.items() if key not in EP_OF_DENSE}
    return world, layout


def theirs(model, shape):
    """transformers: loss, log-probs by sample, and gradients by HF name."""
    batch = layout_work.ragged_batch()
    model.zero_grad()
    log_probs, loss = {}, 0.0
    for sample, advantage in zip(batch.samples, batch.advantages, strict=True):
        logits = model(torch.from_numpy(sample.token_ids)[None]).logits[0] / 0.9
        expected = logits.log_softmax(-1)[len(sample.prompt_ids) - 1 : -1]
        picked = expected.gather(-1, torch.from_numpy(sample.response_ids)[:, None])[:, 0]
        share = -(picked * float(advantage) * torch.from_numpy(sample.loss_mask)).sum() / 200
        share.backward()
        loss += float(share)
        log_probs[sample.sample_id] = picked.detach().numpy()
    kept = {name: tensor.data for name, tensor in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = weight_views(model, shape)
    for name, parameter in model.named_parameters():
        parameter.data = kept[name]
    biases = [name for name in gradients if name.endswith("e_score_correction_bias")]
    return loss, log_probs, {name: value for name, value in gradients.items() if name not in biases}


def test_weights_come_back_bit_for_bit(family):
    from safetensors.torch import load_file

    folder, _, answers = family
    original = load_file(f"{folder}/model.safetensors")
    assert answers["loaded"].keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(answers["loaded"][name], tensor), name


def test_loss_and_gradients_are_those_of_transformers(family):
    folder, model, answers = family
    loss, _, gradients = theirs(model, read_shape(folder))
    assert answers["live"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert worst(answers["live"]["gradients"], gradients) <= 1e-4


def test_log_probs_are_those_of_transformers(family, workers):
    folder, model, _ = family
    _, expected, _ = theirs(model, read_shape(folder))
    (shards,) = workers.run(layout_work.log_probs, 1, folder=folder, layout={})
    found = 0
    for layout, sample_ids, output in shards:
        for sample_id, log_prob in zip(sample_ids, layout.merge_response_values([output[0]]), strict=False):
            np.testing.assert_allclose(log_prob, expected[sample_id], atol=1e-4)
            found += 1
    assert found == len(expected)


def assert_as_one_process(family, workers, name: str) -> None:
    folder, _, expected = family
    world, layout = layout_for(folder, name)
    answers = workers.run(layout_work.everything, world, folder=folder, layout=layout)
    errors = {}
    for routes in [kind for kind in ("live", "R2", "R3") if kind in expected]:
        total = sum(answer[routes]["loss"] for answer in answers)
        errors[f"loss {routes}"] = abs(total / expected[routes]["loss"] - 1)
        errors[f"gradients {routes}"] = worst(answers[0][routes]["gradients"], expected[routes]["gradients"])
    errors["update"] = worst(answers[0]["update"], expected["update"])
    errors["grad_norm"] = abs(answers[0]["grad_norm"] / expected["grad_norm"] - 1)
    assert max(errors.values()) <= TOLERANCE, (name, errors)


@pytest.mark.parametrize("name", QUICK)
def test_a_layout_computes_what_one_process_computes(name, family, workers):
    assert_as_one_process(family, workers, name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - set(QUICK)))
def test_every_layout_computes_what_one_process_computes(name, family, workers):
    assert_as_one_process(family, workers, name)
