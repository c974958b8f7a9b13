"""The JSON Schema takes every recipe there is, as it is written, and refuses what a schema can know to be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from test_rules import IMPOSSIBLE
from test_schema import KINDS, NUMERIC, TOO_LOW_TOO_HIGH

from vespo_megatron.cli import main
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.dotted import nested
from vespo_megatron.recipe.json_schema import json_schema
from vespo_megatron.recipe.schema import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent.name != "studies" or path.stem == "long")
VALIDATOR = Draft202012Validator(json_schema(), format_checker=Draft202012Validator.FORMAT_CHECKER)


def complaints(content: dict) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(json.loads(json.dumps(content)))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_recipe_is_taken_as_it_is_written(path):
    assert complaints(yaml.load(path.read_text(), yaml.SafeLoader) or {}) == []


def test_what_the_command_prints_is_a_json_schema(capsys):
    assert main(["recipe", "schema"]) == 0
    Draft202012Validator.check_schema(json.loads(capsys.readouterr().out))


def test_what_the_recipe_s_own_schema_refuses_the_json_schema_refuses():
    """Of the suite's impossible recipes, those that one value makes impossible."""
    refused = 0
    for values, _, _ in IMPOSSIBLE.values():
        content = {name.replace("__", "."): value for name, value in values.items()}
        try:
            Recipe().with_values(content)
        except UserError:
            refused += 1
            assert complaints(nested(content)) or "nan" in str(content), content
        else:
            assert complaints(nested(content)) == [], "only rules between keys refuse it"
    assert refused >= 12


@pytest.mark.parametrize("name", NUMERIC)
def test_a_number_out_of_its_range_or_none_at_all_is_refused(name):
    low, high = TOO_LOW_TOO_HIGH[name]
    for value in (low if float in KINDS[name] else int(low) - 1, high, "many", [1]):
        assert value is None or complaints(nested({name: value})), (name, value)


@pytest.mark.parametrize(
    "content",
    [
        {"grpo": {"sed": 1}},
        {"grpo": 3},
        {"data": {"shuffle": [1]}},
        {"policy": {"precision": "bf16"}},
        {"policy": {"megatron_cfg": {"moe_token_dispatcher_type": "mail"}}},
        {"env": {"rewards": {"math": "much"}}},
        {"defaults": 3},
    ],
)
def test_unknown_keys_choices_and_types_are_refused(content):
    assert complaints(content)


@pytest.mark.parametrize(
    "content",
    [
        {"defaults": ["a.yaml", "b.yaml"]},
        {"grpo": {"seed": "${oc.env:SEED}"}},
        {"loss_fn": {"hyperparameters": {"_override_": True, "clip_low": 0.2}}},
        {"env": {"rewards": {"_override_": True, "math": 1.0}}},
        {"policy": {"logprob_batch_size": 4, "sequence_packing": {"logprob_mb_tokens": 4}}},
    ],
)
def test_what_only_files_say_is_taken(content):
    assert complaints(content) == []
