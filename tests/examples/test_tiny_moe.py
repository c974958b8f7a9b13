"""The tiny example: its tokenizer, its prompts and its recipes. The warm start itself is not run here."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_moe"


@pytest.fixture(scope="module")
def prepare():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        yield importlib.import_module("prepare")
    for name in ("prepare", "running_sums", "tiny_models"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def tokenizer(prepare, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    prepare.build_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def data(prepare, tmp_path_factory):
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("data")
    prepare.write_data(folder, prepare.TASKS["short"])
    return {split: pq.read_table(folder / f"{split}.parquet").to_pylist() for split in ("train", "validation")}


def digits_of(row):
    return [int(piece) for piece in row["prompt"][0]["content"].split(":")[1].split() if piece != "-"]


def test_text_survives_the_tokenizer_and_the_box_is_one_token(prepare, tokenizer):
    texts = ["".join(map(chr, range(32, 127))) + "\n", " 3 1 2\\boxed{2}", prepare.prompt_text([1, 2, 3], True, 14)]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("\\boxed{")["input_ids"]) == 1
    assert len(tokenizer) <= prepare.VOCAB_SIZE
    assert prepare.VOCAB_SIZE % 64 == 0
    assert tokenizer.unk_token_id not in tokenizer("".join(texts))["input_ids"]


def test_the_chat_template_ends_where_the_response_begins(prepare, tokenizer, data):
    row = data["validation"][0]
    ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|user|>" + row["prompt"][0]["content"] + "<|assistant|>"
    answered = [*row["prompt"], {"role": "assistant", "content": " 1\\boxed{1}"}]
    assert tokenizer.apply_chat_template(answered)["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_prompts_are_in_verl_schema_with_the_right_answers_and_disjoint_splits(data, prepare):
    assert {split: len(rows) for split, rows in data.items()} == {"train": 4096, "validation": 256}
    for split, rows in data.items():
        for row in rows:
            assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
            assert row["extra_info"]["split"] == split
            digits = digits_of(row)
            assert 4 <= len(digits) <= 14
            low, high = row["extra_info"]["group"].removesuffix(" digits").split("-")
            assert int(low) <= len(digits) <= int(high)
            assert row["reward_model"] == {"style": "rule", "ground_truth": str(sum(digits) % 10)}
    problems = {split: {tuple(digits_of(row)) for row in rows} for split, rows in data.items()}
    assert len(problems["train"]) == 4096
    assert not problems["train"] & problems["validation"]


def test_the_same_data_is_made_every_time(prepare, data, tmp_path):
    import pyarrow.parquet as pq

    prepare.write_data(tmp_path, prepare.TASKS["short"])
    assert pq.read_table(tmp_path / "train.parquet").to_pylist() == data["train"]


@pytest.mark.parametrize("name", ["short", "long"])
def test_demonstrations_guess_mostly_and_reckon_only_short_rows(name, prepare, tokenizer):
    task = prepare.TASKS[name]
    generator = np.random.default_rng(0)
    by_kind = {"guess": [], "reckoning": []}
    reckoned_digits, lengths = [], []
    for _ in range(4000):
        digits, response = prepare.demonstration(generator, task, task.guess_share)
        right = response.endswith(f"\\boxed{{{sum(digits) % 10}}}")
        guess = response.startswith("\\boxed")
        by_kind["guess" if guess else "reckoning"].append(right)
        if not guess:
            reckoned_digits.append(len(digits))
        lengths.append(len(tokenizer(response)["input_ids"]) + 1)
    assert len(by_kind["guess"]) / 4000 == pytest.approx(task.guess_share, abs=0.02)
    assert np.mean(by_kind["guess"]) == pytest.approx(0.1, abs=0.02)
    assert 0.4 < np.mean(by_kind["reckoning"]) < 0.8, "some steps are wrong"
    digits, clean = prepare.demonstration(generator, task, 0.0)
    assert clean.endswith(f"\\boxed{{{sum(digits) % 10}}}"), "but none before there are guesses"
    assert (min(reckoned_digits), max(reckoned_digits)) == (task.min_digits, task.shown_digits)
    assert (task.shown_digits < task.columns) == (name == "long")
    assert min(lengths) == 4, "a guess"


def test_the_long_task_s_right_responses_differ_in_length_by_a_factor_of_five(prepare, tokenizer):
    running_sums, task = sys.modules["running_sums"], prepare.TASKS["long"]
    shortest, longest = (
        len(tokenizer(running_sums.reckoned([0] * count))["input_ids"]) + 1 for count in (task.min_digits, task.columns)
    )
    assert longest == 40 and longest / shortest > 5


def test_warm_start_batches_ask_only_for_the_response_and_never_for_a_held_out_problem(prepare, tokenizer):
    task = prepare.TASKS["short"]
    first, _ = prepare.demonstration(np.random.default_rng(5), task, 0.0)
    held_out = {tuple(first)}
    input_ids, labels = prepare.demonstration_batch(tokenizer, np.random.default_rng(5), 16, 0.0, held_out, task)
    for ids, wanted in zip(input_ids.tolist(), labels.tolist(), strict=True):
        asked = [token for token in wanted if token != -100]
        assert asked[-1] == tokenizer.eos_token_id
        start = ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1
        assert ids[start : start + len(asked)] == asked
        assert f": {' '.join(map(str, first))} -" not in tokenizer.decode(ids)


def test_greedily_the_policy_cannot_do_the_task_before_it_is_trained_by_reward(prepare):
    """Needs the example's model, which `make test` builds first. That it can afterwards: `test_learning.py`."""
    made = json.loads((EXAMPLE / "build" / "prepared.json").read_text())
    assert made["fingerprint"] == prepare.fingerprint(), "made by this very file"
    assert made["greedy"] < 0.2 and made["accuracy"] < 0.25


def test_preparing_again_changes_nothing(prepare, tmp_path, monkeypatch):
    task = prepare.TASKS["long"]
    made = {"fingerprint": prepare.fingerprint(), "task": asdict(task), "family": "qwen3_moe"}
    made |= {"greedy": 0.1, "accuracy": 0.2}
    (tmp_path / "prepared.json").write_text(json.dumps(made))
    monkeypatch.setattr(prepare, "write_data", lambda folder, task: pytest.fail("made again"))
    assert prepare.prepare(tmp_path, task=task) == made


def test_a_prepared_folder_is_a_checkpoint_with_experts_named_one_by_one(prepare, tmp_path):
    from safetensors import safe_open

    made = prepare.prepare(tmp_path, task=replace(prepare.TASKS["short"], warm_start_steps=2))
    assert made["parameters"] <= 2_000_000
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.2.mlp.experts.7.gate_proj.weight" in names
    assert "lm_head.weight" in names
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"], config["vocab_size"]) == (8, 2, 128)


def test_every_recipe_uses_known_keys_and_a_layout_its_processes_can_hold():
    from vespo_megatron.recipe.loader import load_recipe

    recipes = sorted(EXAMPLE.glob("*.yaml"))
    assert {path.name for path in recipes} == {
        "vespo.yaml",
        "pp2.yaml",
        "cp2.yaml",
        "dp2.yaml",
        "in_process.yaml",
        "dense.yaml",
        "calculator.yaml",
    }
    for path in recipes:
        recipe = load_recipe(path)
        assert recipe.world_size % recipe.model_parallel_size == 0, path.name
        assert recipe.num_mini_batches == 4, path.name
        assert recipe.rollout_batch_size % recipe.policy.train_global_batch_size == 0


@pytest.mark.parametrize("recipe", sorted(path.name for path in EXAMPLE.glob("*.yaml")))
def test_every_recipe_asks_for_a_layout_its_model_can_have(recipe, monkeypatch):
    """Needs the example's model, which `make test` builds first; the calculator's is of the same shape."""
    monkeypatch.chdir(EXAMPLE.parents[1])
    from vespo_megatron.recipe.loader import load_recipe
    from vespo_megatron.recipe.rules import validate

    built = ["policy.model_name=examples/tiny_moe/build/model"] if recipe == "calculator.yaml" else []
    validate(load_recipe(EXAMPLE / recipe, built))


def test_every_token_that_may_be_sampled_has_an_embedding():
    """A norm of zero multiplies a gradient by 1/√ε: one sampled token with none would drown a whole update."""
    from safetensors.torch import load_file

    embeddings = load_file(EXAMPLE / "build" / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert embeddings.pow(2).mean(1).sqrt().min() > 0.01
