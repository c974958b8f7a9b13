"""One reader of `config.json`: what it reads, and what it refuses, by the key's name."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_config import CONFIG, shape

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_shape import read_shape, shape_of_config


def test_published_and_newer_names_are_the_same_shape():
    newer = {name: value for name, value in CONFIG.items() if name != "num_experts"}
    newer |= {
        "num_local_experts": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "dtype": "bfloat16",
    }
    assert shape_of_config(newer) == shape(rope_theta=1e6, torch_dtype="bfloat16")


def test_what_a_config_leaves_out_is_what_transformers_takes():
    """`Qwen3MoeConfig`'s own defaults, but for `head_dim`, which a checkpoint always tells where it matters."""
    from transformers import Qwen3MoeConfig

    found, theirs = shape(), Qwen3MoeConfig(**{name: value for name, value in CONFIG.items() if name != "model_type"})
    names = ("rms_norm_eps", "norm_topk_prob", "tie_word_embeddings", "max_position_embeddings")
    assert {name: getattr(found, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert found.rope_theta == theirs.rope_parameters["rope_theta"]
    assert found.head_dim == 16 and found.is_moe_layer == (True,) * 4 and found.kv_values_per_token == 2 * 4 * 2 * 16


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (0, 1, 2, 3)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"mlp_only_layers": [0, 3]}, (1, 2)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (3,)),
        ({"mlp_only_layers": None, "decoder_sparse_step": None}, (0, 1, 2, 3)),
    ],
)
def test_which_layers_route(changes, layers):
    found = shape(**changes)
    assert found.moe_layers == layers and found.num_moe_layers == len(layers)


@pytest.mark.parametrize("name", [name for name, value in CONFIG.items() if isinstance(value, int)])
@pytest.mark.parametrize("value", ["four", 0, -1, 2.5, True, [], {}])
def test_a_number_that_cannot_be_is_refused_by_its_name(name, value):
    if (name, value) == ("num_experts", 0) and value is not False:
        return  # a model without experts is one, dense in every layer
    with pytest.raises(UserError, match=rf"{name} is {re.escape(repr(value))}"):
        shape(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_parameters": "plain"}, "rope_parameters is 'plain'"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1"),
        ({"mlp_only_layers": [4]}, r"expected: a list of layers, 0 to 3"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"num_experts_per_tok": 9}, "at most num_experts, 8"),
        ({"num_key_value_heads": 8}, "at most num_attention_heads, 4"),
        ({"hidden_size": 63}, "a multiple of num_attention_heads, 4"),
        ({"architectures": "Qwen3MoeForCausalLM"}, "architectures is 'Qwen3MoeForCausalLM'"),
        ({"dtype": 16}, "dtype is 16"),
        ({"vocab_size": None}, "lacks the key 'vocab_size'"),
        ({"use_sliding_window": True}, "uses a sliding window"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
    ],
)
def test_what_a_model_cannot_have_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        shape(**changes)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-1, 5)),
    st.dictionaries(
        st.sampled_from(["rope_type", "rope_theta", "type"]), st.one_of(st.integers(), st.text()), max_size=2
    ),
)
NAMES = [
    *CONFIG,
    "head_dim",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rms_norm_eps",
    "mlp_only_layers",
    "decoder_sparse_step",
    "architectures",
    "dtype",
    "torch_dtype",
    "attention_bias",
    "tie_word_embeddings",
]


@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
def test_any_config_is_a_shape_or_one_clear_error(changes):
    try:
        found = shape_of_config(CONFIG | changes)
    except UserError as error:
        assert "config.json" in str(error)
    else:
        assert len(found.is_moe_layer) == found.num_hidden_layers and found.kv_values_per_token > 0


def test_the_folder_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": -1}))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'config.json'}: vocab_size is -1")):
        read_shape(tmp_path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"1" * 5_000, b""])
def test_a_file_that_no_parser_takes_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: is not"):
        read_shape(tmp_path)


def test_more_layers_than_can_be_listed_are_refused():
    with pytest.raises(UserError, match="num_hidden_layers is 1000000000000"):
        shape(num_hidden_layers=10**12)
