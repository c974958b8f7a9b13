"""Checkpoints: written as shards, read from shards, tied or not, and refused by name when something is wrong."""

from __future__ import annotations

import json
import shutil

import layout_work
import pytest
import torch
from random_checkpoint import make_checkpoint
from safetensors.torch import load_file, save_file
from test_layout_parity import TOLERANCE, worst

from vespo_megatron.errors import UserError
from vespo_megatron.megatron.hf_weights import SafetensorsFolder
from vespo_megatron.recipe.model_shape import read_shape


def test_a_saved_folder_is_sharded_and_transformers_reads_it(workers, checkpoint, tmp_path):
    folder, model = checkpoint
    target = tmp_path / "saved"
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}
    workers.run(layout_work.save_folder, 2, folder=folder, layout=layout, target=str(target))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1, "the limit was set to force several files"
    from transformers import Qwen3MoeForCausalLM

    again = Qwen3MoeForCausalLM.from_pretrained(target)
    for (name, expected), actual in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name
    # and our own reader takes the sharded folder in another layout
    back = workers.run(layout_work.load_folder, 2, folder=str(target), layout={"pipeline_model_parallel_size": 2})[0]
    for name, tensor in load_file(f"{folder}/model.safetensors").items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize(
    "layout",
    [{"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"pipeline_model_parallel_size": 2}],
    ids=["tp2", "pp2"],
)
def test_tied_embeddings_train_as_on_one_process(layout, workers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    make_checkpoint(folder, tie_word_embeddings=True, num_hidden_layers=2, mlp_only_layers=[])
    run = {
        "folder": str(folder),
        "behavior": {s.sample_id: s.behavior_log_probs for s in layout_work.ragged_batch().samples},
    }
    one = workers.run(layout_work.objectives, 1, layout={}, names=["reinforce"], **run)[0]["reinforce"]
    two = workers.run(layout_work.objectives, 2, layout=layout, names=["reinforce"], **run)[0]["reinforce"]
    assert "lm_head.weight" not in one["gradients"]
    assert worst(two["gradients"], one["gradients"]) <= TOLERANCE


def _broken(checkpoint, tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint[0], folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.2.mlp.experts.5.up_proj.weight"), r"lacks model.layers.2.mlp.experts.5.up_proj"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), r"has model.extra, which has no place"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \[3\]"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_a_wrong_tensor_is_named(change, message, checkpoint, tmp_path):
    folder = _broken(checkpoint, tmp_path, change)
    with pytest.raises(UserError, match=message):
        SafetensorsFolder(folder, read_shape(folder))


def test_a_truncated_file_is_named(checkpoint, tmp_path):
    folder = _broken(checkpoint, tmp_path, lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model.safetensors: is truncated"):
        SafetensorsFolder(folder, read_shape(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "has model_type 'gpt2'"),
        ({"attention_bias": True}, "has attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "asks for rotary embedding 'yarn'"),
        ({"hidden_size": None}, "lacks the key 'hidden_size'"),
    ],
)
def test_a_model_this_project_does_not_train_is_refused(change, message, checkpoint, tmp_path):
    config = json.loads(open(f"{checkpoint[0]}/config.json").read()) | change
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    with pytest.raises(UserError, match=message):
        read_shape(tmp_path)
