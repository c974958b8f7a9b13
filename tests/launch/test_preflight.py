"""What is wrong with model, data or names is said before a server or a trainer process starts."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
from model_config import write_config
from wall import needs_wall

from vespo_megatron.data.prompts import load_tokenizer
from vespo_megatron.errors import UserError
from vespo_megatron.launch import preflight
from vespo_megatron.launch.prompts import load_usable
from vespo_megatron.recipe.schema import Recipe

ROW = {"prompt": "1 1", "data_source": "sums", "reward_model": {"ground_truth": "2"}}


def truth(value):
    return ROW | {"reward_model": {"ground_truth": value}}


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    """A recipe whose files are there and right: a tokenizer of digits, weights and eight prompts."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = tmp_path / "model"
    tokens = {str(digit): digit for digit in range(10)} | {"<end>": 10, "<unk>": 11, "high": 99}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>").save_pretrained(model)
    write_config(model, vocab_size=64, max_position_embeddings=256)
    save_file({"weight": np.zeros((16, 16), np.float32)}, model / "model.safetensors")
    recipe = Recipe().with_values(
        {
            "policy.model_name": str(model),
            "policy.max_total_sequence_length": 64,
            "policy.generation.max_new_tokens": 16,
            "data.max_input_seq_length": 8,
            "grpo.num_prompts_per_step": 8,
            "policy.train_global_batch_size": 64,
            "data.train.path": str(tmp_path / "train.jsonl"),
        }
    )
    write_rows(recipe, [ROW] * 8)
    return recipe


def write_rows(recipe: Recipe, rows: list[dict]) -> None:
    Path(recipe.data.train.path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights(recipe: Recipe) -> Path:
    return Path(recipe.policy.model_name) / "model.safetensors"


def test_what_is_right_passes(recipe):
    preflight.check(recipe)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1 1", "data_source": "sums"}] * 8, r"train\.jsonl: has no column 'reward_model'"),
        ([], r"train\.jsonl"),
        ([ROW] * 7 + [ROW | {"prompt": "1 " * 9}], "row 7: the prompt has 9 tokens"),
        ([ROW] * 7 + [ROW | {"prompt": "1 high"}], "row 7: the prompt has token id 99"),
        ([ROW] * 7, "has 7 prompts"),
        ([ROW] * 7 + [truth(None)], "1 of 8 ground truths .* train/7, 'None', is no answer"),
    ],
)
def test_prompts_that_cannot_be_trained_on_are_named(recipe, rows, message):
    write_rows(recipe, rows)
    with pytest.raises(UserError, match=message):
        preflight.check(recipe)


def test_too_few_prompts_for_what_a_step_begins_are_found(recipe):
    with pytest.raises(UserError, match=r"is 8, which begins 10 with grpo\.oversample 1\.25, but data\.train has 8"):
        preflight.check(recipe.with_values({"grpo.oversample": 1.25}))


def test_ground_truths_that_cannot_be_parsed_are_named_counted_and_an_error_or_left_out(recipe):
    write_rows(recipe, [truth("2")] * 8 + [truth("x^2 +"), truth(r"\sqrt{2}"), truth(r"\frac{1}{"), truth("")])
    named = r"train/8, 'x\^2 \+', cannot be parsed; train/10, .*; train/11, '', "
    with pytest.raises(UserError, match=f"3 of 12 ground truths give no response a score: {named}"):
        preflight.check(recipe)
    dropping = recipe.with_values({"data.on_bad_ground_truth": "drop"})
    note = preflight.check(dropping)[0]
    assert note.startswith(recipe.data.train.path) and "3 of 12" in note
    records, _ = load_usable(dropping.data.train, dropping, load_tokenizer(dropping))
    assert [record.prompt_id for record in records] == [f"train/{n}" for n in (*range(8), 9)]


@needs_wall
def test_a_reward_judges_the_ground_truths_it_is_given(recipe):
    write_rows(recipe, [truth('{"inputs": ["1"], "outputs": []}')] * 8)
    preflight.check(recipe.with_values({"env.reward": "format"}))
    both = {"env.rewards": {"format": 1.0, "code": 1.0}}
    with pytest.raises(UserError, match="8 of 8 ground truths .* 1 inputs have 0 outputs"):
        preflight.check(recipe.with_values(both | {"data.on_bad_ground_truth": "drop"}))


def test_a_data_file_that_is_not_there_names_its_key(recipe):
    recipe = recipe.with_values({"data.validation.path": "absent.parquet"})
    with pytest.raises(UserError, match=r"data\.validation\.path: absent\.parquet does not exist"):
        preflight.check(recipe)


@pytest.mark.parametrize("size", [0, 4, 20, -1])
def test_a_truncated_checkpoint_names_the_file_and_the_size_it_should_have(recipe, size):
    path = weights(recipe)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.safetensors: is (truncated|damaged)"):
        preflight.check(recipe)


def test_a_checkpoint_with_bytes_to_spare_is_damaged(recipe):
    path = weights(recipe)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"model\.safetensors: is damaged"):
        preflight.check(recipe)


def test_a_shard_the_index_names_must_be_there(recipe):
    index = weights(recipe).with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}))
    with pytest.raises(UserError, match=r"model-00002\.safetensors: is named by the index but missing"):
        preflight.check(recipe)
    index.write_text("{}")
    with pytest.raises(UserError, match=r"index\.json: is damaged"):
        preflight.check(recipe)


def test_a_model_folder_without_weights_or_of_another_kind_is_refused(recipe):
    weights(recipe).unlink()
    with pytest.raises(UserError, match="holds no weights"):
        preflight.check(recipe)
    config = weights(recipe).with_name("config.json")
    write_config(config.parent, model_type="llama")
    with pytest.raises(UserError, match="llama"):
        preflight.check(recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_fn.name": "vesppo"}, "the nearest is 'vespo'"),
        ({"loss_fn.hyperparameters": {"c9": 1}}, "c9"),
        ({"loss_fn.aggregation": "token_mean"}, "token-mean"),
        ({"grpo.advantage_estimator": "group"}, "advantage_estimator"),
        ({"env.reward": "maths"}, "env.reward"),
        ({"policy.tokenizer.name": "/nowhere"}, "no tokenizer"),
    ],
)
def test_names_that_no_table_has_are_refused(recipe, change, message):
    with pytest.raises(UserError, match=message):
        preflight.check(recipe.with_values(change))


def test_a_temporary_folder_whose_name_leaves_no_room_for_a_socket_is_named(recipe, tmp_path, monkeypatch):
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(UserError, match=r"TMPDIR: is .*longlong.*\n  expected: at most 75 characters"):
        preflight.check(recipe)
    preflight.check(recipe.with_values({"policy.generation.backend": "in_process", "env.reward": "exact_match"}))


# ---- through the command line ------------------------------------------------------------------------------------


def train(recipe: Recipe, folder: Path, *overrides: str) -> int:
    from vespo_megatron.cli import main
    from vespo_megatron.recipe.loader import save_recipe

    save_recipe(recipe, folder / "recipe.yaml")
    return main(["train", str(folder / "recipe.yaml"), f"exp_manager.exp_dir={folder / 'runs'}", *overrides])


def test_a_refused_recipe_leaves_no_run_directory(recipe, tmp_path, capsys):
    weights(recipe).write_bytes(b"short")
    assert train(recipe, tmp_path) == 2
    assert capsys.readouterr().err.startswith("vespo-megatron: ") and not (tmp_path / "runs").exists()


def test_a_port_in_use_is_named_at_once(recipe, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert train(recipe, tmp_path, f"policy.generation.sglang_cfg.port={port}", "cluster.device=cpu") == 2
    assert f"port {port} of 127.0.0.1 is in use by process {os.getpid()} (" in capsys.readouterr().err
