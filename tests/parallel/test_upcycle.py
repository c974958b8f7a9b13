"""A dense model as an MoE: it computes the same on every layout; with noise its experts part."""

from __future__ import annotations

import json

import layout_work
import numpy as np
import pytest
import torch
from family_checkpoints import make_family
from safetensors.torch import load_file
from test_layout_parity import LAYOUTS

from vespo_megatron.cli import main
from vespo_megatron.errors import UserError
from vespo_megatron.launch.upcycle import numbers_of, upcycle
from vespo_megatron.recipe.model_shape import read_shape

DENSE = ("llama", "qwen3")


@pytest.fixture(scope="module", params=DENSE)
def pair(request, tmp_path_factory):
    """(transformers' dense model, folder of the MoE it became)."""
    folder = tmp_path_factory.mktemp(request.param)
    dense = make_family(folder / "dense", request.param)
    assert main(["convert", str(folder / "dense"), str(folder / "moe"), "--upcycle", "experts=4,topk=2"]) in (None, 0)
    return dense.eval(), folder / "moe"


def test_transformers_reads_it_and_computes_what_it_was(pair):
    from transformers import AutoModelForCausalLM

    dense, folder = pair
    moe = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert read_shape(folder).num_moe_layers == read_shape(folder).num_hidden_layers == 4
    ids = torch.randint(0, 126, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(moe(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-5)
        _, _, chosen = moe.model.layers[1].mlp.gate(torch.randn(64, 64))
    assert len(chosen.unique()) == 4, "routers choose, though it changes nothing"


def assert_as_dense(pair, workers, name: str) -> None:
    dense, folder = pair
    world, layout = LAYOUTS[name]
    samples = {sample.sample_id: sample for sample in layout_work.ragged_batch().samples}
    parts: dict[tuple[str, ...], list] = {}
    for answer in workers.run(layout_work.log_probs, world, folder=str(folder), layout=layout):
        for where, sample_ids, output in answer or ():
            parts.setdefault(tuple(sample_ids), []).append((where, output))
    for sample_ids, shards in parts.items():
        ranked = sorted(shards, key=lambda shard: shard[0].context_parallel_rank)
        merged = ranked[0][0].merge_response_values([output[0] for _, output in ranked])
        for sample_id, found in zip(sample_ids, merged, strict=False):
            sample = samples.pop(sample_id)
            with torch.no_grad():
                logits = dense(torch.from_numpy(sample.token_ids)[None]).logits[0] / 0.9
            rows = logits.log_softmax(-1)[len(sample.prompt_ids) - 1 : -1]
            expected = rows.gather(-1, torch.from_numpy(sample.response_ids)[:, None])[:, 0]
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert not samples, "every sample was scored"


@pytest.mark.parametrize("name", ["tp2_pp2_cp2_ep2"])
def test_on_a_layout_it_is_the_dense_model(name, pair, workers):
    assert_as_dense(pair, workers, name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "tp2_pp2_cp2_ep2"])
def test_on_every_layout_it_is_the_dense_model(name, pair, workers):
    assert_as_dense(pair, workers, name)


def test_noise_parts_the_experts_and_the_seed_tells_which(tmp_path):
    make_family(tmp_path / "dense", "llama")
    for target, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle(tmp_path / "dense", tmp_path / target, experts=3, topk=1, jitter=0.1, seed=seed)
    a, b, c = (load_file(tmp_path / target / "model-00001.safetensors") for target in "abc")
    name = "model.layers.2.block_sparse_moe.experts.{}.w1.weight"
    dense = load_file(tmp_path / "dense" / "model.safetensors")["model.layers.2.mlp.gate_proj.weight"]
    assert torch.equal(a[name.format(0)], dense)
    for expert in (1, 2):
        off = a[name.format(expert)] - dense
        assert float(off.std()) == pytest.approx(0.1 * float(dense.std()), rel=0.1)
        assert torch.equal(a[name.format(expert)], b[name.format(expert)])
        assert not torch.equal(a[name.format(expert)], c[name.format(expert)])
    assert not torch.equal(a[name.format(1)], a[name.format(2)])


@pytest.mark.parametrize("given", ["experts=4", "experts=2,topk=3", "experts=0,topk=0", "4,2", "experts=4,topk=-1"])
def test_what_is_no_number_of_experts_is_refused(given):
    with pytest.raises(UserError, match="expected: experts=E,topk=K"):
        numbers_of(given)


def test_an_moe_a_used_name_and_options_of_another_use_are_refused(tmp_path, capsys):
    make_family(tmp_path / "moe", "olmoe")
    with pytest.raises(UserError, match="is a olmoe, which has no MoE of copies"):
        upcycle(tmp_path / "moe", tmp_path / "new", experts=2, topk=1)
    make_family(tmp_path / "dense", "llama")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists"):
        upcycle(tmp_path / "dense", tmp_path / "there", experts=2, topk=1)
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "out"), "--jitter", "0.1"]) == 2
    assert "--jitter: is for --upcycle" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()


def test_a_damaged_source_leaves_nothing_behind(tmp_path):
    make_family(tmp_path / "dense", "llama")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"intermediate_size": 97}))
    with pytest.raises(UserError, match="has shape"):
        upcycle(tmp_path / "dense", tmp_path / "moe", experts=2, topk=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]
