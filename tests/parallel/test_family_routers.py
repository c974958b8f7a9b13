"""Routers of sigmoids, of unnormalised gates, with a correction bias: by the formula, replayed, learnt and exported."""

from __future__ import annotations

import family_work
import pytest
import torch
from family_checkpoints import FAMILIES, make_family
from test_layout_parity import LAYOUTS

from vespo_megatron.recipe.model_shape import read_shape

SPARSE = [name for name in FAMILIES if name not in ("qwen3", "llama")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(model_type: str) -> str:
        if model_type not in made:
            made[model_type] = str(tmp_path_factory.mktemp(model_type))
            make_family(made[model_type], model_type)
        return made[model_type]

    return folder


def gates_of(shape, hidden, weight, experts) -> torch.Tensor:
    """g = I·s / Σ I·s, scaled: the gates of the given experts [tokens, topk], dense [tokens, experts], in float64."""
    logits = hidden.double() @ weight.double().T
    scores = logits.sigmoid() if shape.router_scores == "sigmoid" else logits.softmax(-1)
    chosen = torch.zeros_like(scores).scatter(1, experts, 1.0)
    gates = chosen * scores
    if shape.norm_topk_prob:
        gates = gates / gates.sum(-1, keepdim=True)
    return gates * shape.routed_scaling_factor


@pytest.mark.parametrize("model_type", SPARSE)
def test_gates_are_the_formula_live_and_replayed(model_type, folders, workers):
    shape = read_shape(folders(model_type))
    (layers,) = workers.run(family_work.gates, 1, folder=folders(model_type), layout={})
    assert len(layers) == shape.num_moe_layers
    for layer in layers:
        preferred = layer["input"].double() @ layer["weight"].double().T
        if shape.correction_bias:
            assert layer["bias"].abs().max() > 0.1
            preferred = preferred.sigmoid() + layer["bias"].double()
        own = preferred.topk(2).indices
        torch.testing.assert_close(own.sort().values, layer["live_experts"].sort().values)
        for given, kept, found in (
            ("input", "live_experts", "gates"),
            ("replayed_input", "replayed_experts", "replayed"),
        ):
            rows = layer["recorded"] if found == "replayed" else slice(None)
            expected = gates_of(shape, layer[given], layer["weight"], layer[kept])
            torch.testing.assert_close(layer[found][rows].double(), expected[rows], atol=1e-5, rtol=1e-5)
        differ = (layer["live_experts"].sort().values != layer["replayed_experts"].sort().values).any(-1)
        assert differ[layer["recorded"]].float().mean() > 0.5, "the replayed routes are not the live ones"


@pytest.mark.parametrize("name", ["recompute", "dp2", "tp2_sp", "pp2_cp2_ep2"])
def test_the_correction_bias_moves_as_megatron_core_moves_it(name, folders, workers):
    """Every expert by the rate: up where it had fewer tokens than the mean, down where more (arXiv 2408.15664)."""
    (alone,) = workers.run(family_work.bias_updates, 1, folder=folders("glm4_moe"), layout={})
    world, layout = LAYOUTS[name]
    answer = workers.run(family_work.bias_updates, world, folder=folders("glm4_moe"), layout=layout)[0]
    assert len(answer["before"]) == read_shape(folders("glm4_moe")).num_moe_layers
    for layer, before in answer["before"].items():
        moved = answer["after"][layer] - before
        steps = (moved / 0.01).round()
        torch.testing.assert_close(moved, steps * 0.01, atol=1e-6, rtol=0)
        assert set(steps.tolist()) <= {-1.0, 0.0, 1.0} and {-1.0, 1.0} <= set(steps.tolist())
        torch.testing.assert_close(answer["after"][layer], alone["after"][layer])


def test_which_experts_the_bias_favours_is_counted_by_hand(folders, workers):
    """The sign of each step against the choices of one process's routers on the same tokens."""
    folder = folders("glm4_moe")
    (layers,) = workers.run(family_work.gates, 1, folder=folder, layout={})
    (moved,) = workers.run(family_work.bias_updates, 1, folder=folder, layout={})
    for layer, name in zip(layers, moved["before"], strict=True):
        counts = torch.bincount(layer["live_experts"][layer["recorded"]].flatten(), minlength=8).float()
        unclear = (counts - counts.mean()).abs() < 17  # a row of each of 16 samples has no recorded route
        steps = ((moved["after"][name] - moved["before"][name]) / 0.01).round()
        assert (~unclear).sum() >= 4
        torch.testing.assert_close(steps[~unclear], (counts.mean() - counts).sign()[~unclear])


@pytest.mark.parametrize("name", ["recompute", "tp2_pp2_cp2_ep2"])
def test_a_bfloat16_policy_keeps_the_bias_in_float32(name, folders, workers):
    from safetensors.torch import load_file

    world, layout = LAYOUTS[name]
    found = workers.run(family_work.rounded_weights, world, folder=folders("glm4_moe"), layout=layout)[0]
    for tensor, expected in load_file(f"{folders('glm4_moe')}/model.safetensors").items():
        kept = tensor.endswith("e_score_correction_bias")
        assert torch.equal(found[tensor], expected if kept else expected.bfloat16()), tensor


def test_gradients_alone_and_a_refused_update_leave_the_bias(folders, workers):
    (biases,) = workers.run(family_work.refused_update, 1, folder=folders("glm4_moe"), layout={})
    assert biases
    for before, after in biases.values():
        assert torch.equal(before, after)
