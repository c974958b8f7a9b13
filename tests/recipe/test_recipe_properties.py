"""Whatever is written into a recipe, it loads or is refused by a `UserError`; what loads is saved without loss."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.documentation import documentation
from vespo_megatron.recipe.loader import flatten, load_recipe, save_recipe
from vespo_megatron.recipe.rules import problems
from vespo_megatron.recipe.schema import Recipe

KEYS = sorted(flatten(Recipe()))
SECTIONS = sorted(set(documentation()) - set(KEYS))
# OmegaConf takes some 20 ms a recipe, which is a hundred times what the other properties cost.
in_one_folder = settings(
    max_examples=settings.default.max_examples // 5, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

text = st.text(st.characters(codec="utf-8"), max_size=12)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)


def nested(key: str, value: object) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@in_one_folder
@given(st.sampled_from(KEYS + SECTIONS), values)
def test_any_value_of_any_key_is_taken_or_refused(tmp_path, key, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(nested(key, value), allow_unicode=True))
    try:
        recipe = load_recipe(path, ["policy.model_name=m"])
    except UserError as error:
        assert str(path) in str(error) or "command line" in str(error)
        return
    list(problems(recipe))


@in_one_folder
@given(st.text(max_size=40))
def test_any_override_is_taken_or_refused(tmp_path, override):
    path = tmp_path / "recipe.yaml"
    path.write_text("policy: {model_name: m}")
    try:
        load_recipe(path, [override])
    except UserError as error:
        assert str(error)


@in_one_folder
@given(st.binary(max_size=80))
def test_any_bytes_are_a_recipe_or_refused(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError):  # without a model there is no recipe
        load_recipe(path)


@in_one_folder
@given(text)
@example("a\x85b")
@example("\u2028")
@example("1e-6")
@example("${x}")
def test_any_text_is_saved_as_it_is(tmp_path, value):
    recipe = Recipe().with_values({"policy.model_name": "m", "policy.generation.sglang_cfg.python": value})
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml").policy.generation.sglang_cfg.python == value


@in_one_folder
@given(st.data())
def test_what_is_saved_reads_back_equal(tmp_path, data):
    recipe = Recipe().with_values(
        {
            "policy.model_name": data.draw(text),
            "grpo.seed": data.draw(st.integers(0, 2**40)),
            "policy.megatron_cfg.optimizer.lr": data.draw(st.floats(0, exclude_min=True, allow_infinity=False)),
            "loss_fn.hyperparameters": data.draw(st.dictionaries(st.text("abc_", min_size=1), values, max_size=3)),
            "policy.generation.stop_token_ids": data.draw(st.lists(st.integers(0, 2**31))),
            "policy.generation.sglang_cfg.python": data.draw(st.one_of(st.none(), text)),
        }
    )
    save_recipe(recipe, tmp_path / "saved.yaml")
    again = load_recipe(tmp_path / "saved.yaml")
    assert same(again.model_dump(), recipe.model_dump())


def same(a: object, b: object) -> bool:
    """Equal, NaN included."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and a == b
