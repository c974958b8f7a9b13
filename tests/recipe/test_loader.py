"""Recipes: what wins over what, and what a person is told when a key or value is wrong."""

from __future__ import annotations

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.recipe import schema
from vespo_megatron.recipe.documentation import documentation
from vespo_megatron.recipe.loader import differences, flatten, load_recipe, save_recipe


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, text: str):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


MODEL = "policy: {model_name: some/model}\n"


def test_a_recipe_is_typed_sections_with_every_default(write):
    recipe = load_recipe(write("a.yaml", MODEL))
    assert isinstance(recipe.policy.megatron_cfg.optimizer, schema.OptimizerConfig)
    assert recipe.policy.model_name == "some/model"
    assert recipe.grpo == schema.GRPOConfig()


def test_later_defaults_win_over_earlier_ones_the_file_over_them_and_the_command_line_over_all(write):
    write("base/one.yaml", MODEL + "grpo: {seed: 1, val_period: 1, max_num_steps: 1}\n")
    write("base/two.yaml", "grpo: {seed: 2, val_period: 2}\n")
    path = write("child/a.yaml", "defaults: [../base/one.yaml, ../base/two.yaml]\ngrpo: {seed: 3}\n")
    recipe = load_recipe(path)
    assert (recipe.grpo.seed, recipe.grpo.val_period, recipe.grpo.max_num_steps) == (3, 2, 1)
    assert load_recipe(path, ["grpo.seed=4", "policy.megatron_cfg.optimizer.lr=1e-3"]).grpo.seed == 4


def test_defaults_are_relative_to_the_file_that_names_them(write, monkeypatch, tmp_path):
    write("a/base.yaml", "defaults: deep/deepest.yaml\n")
    write("a/deep/deepest.yaml", MODEL)
    path = write("b/c/child.yaml", "defaults: ../../a/base.yaml\n")
    monkeypatch.chdir("/")
    assert load_recipe(path).policy.model_name == "some/model"


def test_recipe_dir_is_the_folder_of_the_file_that_says_it(write, tmp_path):
    write("base/base.yaml", "policy: {model_name: '${recipe_dir}/model'}\n")
    path = write("child.yaml", "defaults: base/base.yaml\ndata: {train: {path: '${recipe_dir}/train.parquet'}}\n")
    recipe = load_recipe(path)
    assert recipe.policy.model_name == f"{tmp_path}/base/model"
    assert recipe.data.train.path == f"{tmp_path}/train.parquet"


def test_interpolation_is_resolved(write):
    recipe = load_recipe(write("a.yaml", MODEL + "grpo: {seed: 7}\nexp_manager: {name: 'run_${grpo.seed}'}\n"))
    assert recipe.exp_manager.name == "run_7"


def test_free_mappings_merge_unless_they_say_override(write):
    write("base.yaml", MODEL + "loss_fn: {name: vespo, hyperparameters: {c1_pos: 1.0}}\n")
    merged = load_recipe(write("a.yaml", "defaults: base.yaml\nloss_fn: {hyperparameters: {c2_pos: 2.0}}\n"))
    assert merged.loss_fn.hyperparameters == {"c1_pos": 1.0, "c2_pos": 2.0}
    text = "defaults: base.yaml\nloss_fn: {name: grpo, hyperparameters: {_override_: true, clip_ratio: 0.2}}\n"
    replaced = load_recipe(write("b.yaml", text))
    assert replaced.loss_fn.hyperparameters == {"clip_ratio": 0.2}
    emptied = load_recipe(write("c.yaml", "defaults: base.yaml"), ["loss_fn.hyperparameters={_override_: true}"])
    assert emptied.loss_fn.hyperparameters == {}


def test_an_unknown_key_names_the_nearest_known_one_and_the_file_it_is_in(write):
    write("base.yaml", "policy: {model_name: m, megatron_cfg: {tensor_model_paralel_size: 2}}\n")
    child = write("child.yaml", "defaults: base.yaml\n")
    with pytest.raises(UserError) as error:
        load_recipe(child)
    assert "policy.megatron_cfg.tensor_model_parallel_size" in str(error.value)
    assert "base.yaml" in error.value.where


def test_an_unknown_key_in_the_wrong_section_is_told_where_it_belongs(write):
    with pytest.raises(UserError, match=r"policy\.megatron_cfg\.sequence_parallel"):
        load_recipe(write("a.yaml", MODEL + "grpo: {sequence_parallel: true}\n"))


def test_an_unknown_override_names_the_command_line(write):
    with pytest.raises(UserError, match=r"command line: grpo\.sed=1.*grpo\.seed"):
        load_recipe(write("a.yaml", MODEL), ["grpo.sed=1"])


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("grpo.max_num_steps=many", "grpo.max_num_steps", "int"),
        ("grpo.max_num_steps=1.5", "grpo.max_num_steps", "int"),
        ("data.shuffle=[1]", "data.shuffle", "bool"),
        ("data=3", "data", "a section with train"),
        ("policy.sequence_packing=off", "policy.sequence_packing", "a section with enabled"),
        ("policy.megatron_cfg.optimizer.lr=fast", "policy.megatron_cfg.optimizer.lr", "float"),
        ("policy.generation.top_k=all", "policy.generation.top_k", "int or null"),
        ("policy.generation.stop_token_ids=[x]", "policy.generation.stop_token_ids", "list[int]"),
        ("grpo.seed=null", "grpo.seed", "int"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_key_and_type(write, override, key, expected):
    with pytest.raises(UserError) as error:
        load_recipe(write("a.yaml", MODEL), [override])
    assert key in error.value.what
    assert expected in error.value.expected
    assert override in error.value.where


def test_a_missing_mandatory_key_is_named(write):
    with pytest.raises(UserError, match=r"policy\.model_name has no value"):
        load_recipe(write("a.yaml", "grpo: {seed: 1}\n"))


@pytest.mark.parametrize("text", ["no_equals", "=3", "a b=3", "+grpo.seed=3"])
def test_what_is_no_override_is_refused(write, text):
    with pytest.raises(UserError, match="is no override"):
        load_recipe(write("a.yaml", MODEL), [text])


def test_circular_defaults_are_an_error_not_a_hang(write):
    write("a.yaml", "defaults: b.yaml\n")
    with pytest.raises(UserError, match=r"circle: b\.yaml → a\.yaml → b\.yaml"):
        load_recipe(write("b.yaml", "defaults: a.yaml\n"))


def test_a_missing_file_names_the_nearest_one_and_who_wanted_it(write, tmp_path):
    write("vespo.yaml", MODEL)
    with pytest.raises(UserError, match=r"vespo\.yaml exists"):
        load_recipe(tmp_path / "vesop.yaml")
    with pytest.raises(UserError, match=r"child\.yaml: defaults: there is no recipe"):
        load_recipe(write("child.yaml", "defaults: absent.yaml\n"))


@pytest.mark.parametrize("text", ["policy: [", "- a\n- b\n", "just text", "a: ${"])
def test_a_file_that_is_no_recipe_is_an_error(write, text):
    with pytest.raises(UserError, match=r"a\.yaml"):
        load_recipe(write("a.yaml", text))


def test_an_unresolvable_interpolation_is_an_error(write):
    with pytest.raises(UserError, match="nowhere"):
        load_recipe(write("a.yaml", MODEL + "exp_manager: {name: '${nowhere}'}\n"))


def test_a_saved_recipe_reads_back_equal(write, tmp_path):
    overrides = [
        "policy.megatron_cfg.optimizer.lr=1e-6",
        "exp_manager.name='1e-6'",
        "exp_manager.version='007'",
        "loss_fn.hyperparameters={a: 1.5, b: [1, 2], c: x}",
        "policy.generation.sglang_cfg.urls=['http://127.0.0.1:1']",
        "data.train.path='a b: c #d.parquet'",
    ]
    recipe = load_recipe(write("a.yaml", MODEL), overrides).with_values({"data.validation.path": "odd/${name}.parquet"})
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert not list(tmp_path.glob("*.partial"))


def test_every_key_is_documented(write):
    keys = documentation()
    assert "policy.megatron_cfg.optimizer.lr" in keys
    assert keys["policy.generation"] == "`policy.generation`."
    recipe = load_recipe(write("a.yaml", MODEL))
    assert set(flatten(recipe)) < set(keys)


def test_differences_lists_what_differs_and_nothing_else(write):
    path = write("a.yaml", MODEL)
    found = differences(load_recipe(path), load_recipe(path, ["grpo.seed=7"]))
    assert found == {"grpo.seed": (42, 7)}


def test_no_section_of_the_schema_shares_state_between_recipes():
    first, second = schema.Recipe(), schema.Recipe()
    first.loss_fn.hyperparameters["x"] = 1
    assert second.loss_fn.hyperparameters == {}
