"""Where responses end: at every token that the model's folder or the tokenizer names, or at the recipe's."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from vespo_megatron.controller.sampler import Sampler
from vespo_megatron.data.stop_tokens import describe_stop_tokens, stop_tokens
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe


def tokenizer(eos):
    return SimpleNamespace(eos_token_id=eos, convert_ids_to_tokens=lambda token: f"<{token}>")


@pytest.fixture
def recipe_of(tmp_path):
    def make(config=None, generation=None, **values):
        for name, eos in (("config", config), ("generation_config", generation)):
            (tmp_path / f"{name}.json").write_text(json.dumps({} if eos is None else {"eos_token_id": eos}))
        return Recipe().with_values({"policy.model_name": str(tmp_path)} | values)

    return make


@pytest.mark.parametrize(
    ("config", "generation", "eos", "expected"),
    [
        (None, [7, 3], 3, [3, 7]),
        (5, [7, 3], None, [3, 5, 7]),
        (None, None, 3, [3]),
        (3, 3, 3, [3]),
        ([4, 2], None, None, [2, 4]),
    ],
)
def test_all_that_are_named_end_a_response(recipe_of, config, generation, eos, expected):
    recipe = recipe_of(config, generation)
    assert list(stop_tokens(recipe, tokenizer(eos))) == expected
    assert Sampler(recipe, tokenizer(eos), None, None).training.stop_token_ids == tuple(expected)


def test_the_recipes_take_their_place(recipe_of):
    recipe = recipe_of(5, [7], **{"policy.generation.stop_token_ids": [9, 8]})
    assert list(stop_tokens(recipe, tokenizer(3))) == [8, 9]


def test_what_a_run_says_of_them_names_each_with_who_says_so(recipe_of):
    told = describe_stop_tokens(recipe_of(7, [7, 3]), tokenizer(3))
    assert told == "<3> (3: generation_config.json, tokenizer), <7> (7: generation_config.json, config.json)"


def test_no_end_at_all_is_an_error_that_says_what_to_set(recipe_of):
    with pytest.raises(UserError, match="names no token that ends a response") as caught:
        stop_tokens(recipe_of(), tokenizer(None))
    assert "policy.generation.stop_token_ids" in caught.value.fix


@pytest.mark.parametrize("wrong", ["</s>", [3, None], 2.5, -1, True, {}])
def test_an_end_that_is_no_token_names_the_file(recipe_of, wrong):
    with pytest.raises(UserError, match="eos_token_id") as caught:
        stop_tokens(recipe_of(None, wrong), tokenizer(3))
    assert caught.value.where.endswith("generation_config.json")
