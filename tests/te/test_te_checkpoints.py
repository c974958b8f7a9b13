"""Checkpoints of native layers and of Transformer Engine's are the same checkpoints, and older ones can be read."""

from __future__ import annotations

import checkpoint_work
import pytest
import te_work
import torch
from safetensors.torch import load_file
from test_layout_parity import CP, EP, PP, SP, TP, worst

from vespo_megatron.launch.convert import convert

pytestmark = pytest.mark.parallel
LAYOUTS = {
    "one": (1, {}),
    "whole": (2, {EP: 2, "optimizer.use_distributed_optimizer": False}),
    "tp2_ep2": (2, {TP: 2, EP: 2, SP: True}),
    "pp2_cp2_ep2": (4, {PP: 2, CP: 2, EP: 2}),
}
KINDS = ("te", "native")


@pytest.fixture(scope="module")
def run(te_workers, plain_workers, checkpoint):
    """Work of ranks with layers of a kind: Transformer Engine is there with `te`, and not with `native`."""

    def run_it(layers, work, layout="one", **arguments):
        world_size, keys = LAYOUTS[layout]
        pool = te_workers if layers == "te" else plain_workers
        arguments |= {"layers": layers, "work": work, "folder": checkpoint, "layout": keys}
        return pool.run(te_work.with_layers, world_size, **arguments)

    return run_it


@pytest.fixture(scope="module", params=[("te", "tp2_ep2"), ("te", "one"), ("native", "tp2_ep2")])
def saved(request, run, tmp_path_factory):
    """(kind, layout, folder, what the policy was and did next)."""
    layers, layout = request.param
    folder = str(tmp_path_factory.mktemp("saved"))
    answers = run(layers, checkpoint_work.save_after_two_updates, layout, checkpoint=folder)
    return layers, layout, folder, answers


def test_both_kinds_have_the_same_keys_and_shapes(run):
    te, native = (run(kind, te_work.checkpoint_keys)[0] for kind in KINDS)
    assert te == native
    prefix = "decoder.layers."
    assert te[f"{prefix}0.self_attention.linear_qkv.layer_norm_weight"] == (64,)
    assert te[f"{prefix}0.pre_mlp_layernorm.weight"] == (64,)  # a MoE layer
    assert te[f"{prefix}1.mlp.linear_fc1.layer_norm_weight"] == (64,)  # the dense one
    assert te[f"{prefix}0.mlp.experts.experts.linear_fc1.weight"] == (8, 64, 64)
    assert te[f"optimizer.state.exp_avg.{prefix}0.pre_mlp_layernorm.weight"] == (64,)


@pytest.mark.parametrize("reader", KINDS)
@pytest.mark.parametrize("layout", ["one", "pp2_cp2_ep2"])
def test_either_kind_goes_on_from_a_checkpoint_of_either(saved, reader, layout, run):
    _, _, folder, expected = saved
    found = run(reader, checkpoint_work.load_and_go_on, layout, checkpoint=folder)[0]
    assert all(torch.equal(found["weights"][key], tensor) for key, tensor in expected[0]["weights"].items())
    assert found["learning_rate"] == expected[0]["learning_rate"]
    assert worst(found["next"], expected[0]["next"]) < 1e-4


def test_the_same_kind_and_layout_goes_on_to_the_last_bit(saved, run):
    layers, layout, folder, expected = saved
    found = run(layers, checkpoint_work.load_and_go_on, layout, checkpoint=folder, same_layout=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours["random"], theirs["random"]) and ours["grad_norm"] == theirs["grad_norm"]
    for part in ("weights", "next"):
        assert all(torch.equal(found[0][part][key], tensor) for key, tensor in expected[0][part].items())


@pytest.mark.parametrize(("writer", "reader"), [("te", "native"), ("native", "te"), ("te", "te")])
def test_an_optimizer_that_is_not_distributed_counts_on_in_the_other_kind(writer, reader, run, tmp_path):
    expected = run(writer, checkpoint_work.save_after_two_updates, "whole", checkpoint=str(tmp_path))
    found = run(reader, checkpoint_work.load_and_go_on, "whole", checkpoint=str(tmp_path))
    assert worst(found[0]["next"], expected[0]["next"]) < 1e-4


@pytest.mark.parametrize("writer", KINDS)
@pytest.mark.parametrize("reader", KINDS)
def test_a_checkpoint_from_before_the_first_update(writer, reader, run, tmp_path):
    expected = run(writer, te_work.save_at_once, target=str(tmp_path))
    found = run(reader, checkpoint_work.load_and_go_on, checkpoint=str(tmp_path))
    assert worst(found[0]["next"], expected[0]["next"]) < 1e-4


@pytest.mark.parametrize("reader", KINDS)
def test_a_checkpoint_with_the_keys_of_before_is_read(reader, run, tmp_path):
    expected = run("native", te_work.save_as_before, target=str(tmp_path))
    keys = (tmp_path / ".metadata").read_bytes()
    assert b"layers.0.mlp.linear_fc1.layer_norm_weight" in keys and b"pre_mlp_layernorm" not in keys
    found = run(reader, checkpoint_work.load_and_go_on, checkpoint=str(tmp_path))[0]
    assert all(torch.equal(found["weights"][key], tensor) for key, tensor in expected[0]["weights"].items())
    assert worst(found["next"], expected[0]["next"]) < 1e-4


def test_convert_reads_what_a_policy_of_its_layers_saved(run, checkpoint, tmp_path):
    saved, target = tmp_path / "saved", tmp_path / "converted"
    saved.mkdir()
    run("te", te_work.save_weights, "tp2_ep2", target=str(saved))
    assert str(target) in convert(saved, target, model=checkpoint, progress=False)
    original, found = load_file(f"{checkpoint}/model.safetensors"), load_file(target / "model-00001.safetensors")
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())
