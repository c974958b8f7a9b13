"""Several sets in one recipe: rewards by source and by set, contamination, what `data show` and `data stats` say."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer, template
from model_config import write_config

from vespo_megatron.controller import evaluation
from vespo_megatron.controller.sampler import Sampler
from vespo_megatron.data.sample import Sample
from vespo_megatron.errors import UserError
from vespo_megatron.launch import data_report, preflight
from vespo_megatron.launch.prompts import load_run_prompts, load_usable
from vespo_megatron.recipe.rules import validate
from vespo_megatron.recipe.schema import Recipe, SetConfig
from vespo_megatron.rewards import RewardPool, RewardRequest


def write(folder: Path, name: str, rows: list[tuple[str, str, str]]) -> str:
    """Rows of (prompt, source, ground truth)."""
    file = folder / f"{name}.jsonl"
    made = [
        {"prompt": prompt, "data_source": source, "reward_model": {"ground_truth": truth}}
        for prompt, source, truth in rows
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(file)


@pytest.fixture
def recipe(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    write_config(model, vocab_size=512, max_position_embeddings=256)
    byte_tokenizer(template("qwen3")).save_pretrained(model)
    sums = write(tmp_path, "sums", [(f"{n} + 1 =", "sums", str(n + 1)) for n in range(30)])
    words = write(tmp_path, "words", [(f"word {n}", "words/short", f"w{n}") for n in range(12)])
    tests = write(
        tmp_path, "tests", [("3 + 1 =", "sums", "4"), ("90 + 1 =", "sums", "91"), ("word 77", "words/x", "w")]
    )
    return Recipe().with_values(
        {
            "policy.model_name": str(model),
            "data.train.sets": {"sums": SetConfig(path=sums, weight=3), "words": SetConfig(path=words, weight=1)},
            "data.validation.sets": {
                "hard": SetConfig(path=tests, num_samples=3, temperature=0.5),
                "again": SetConfig(path=tests, max_samples=2),
            },
            "env.reward_by_source": {"sums": {"reward": "math"}, "words/*": {"reward": "exact_match"}},
        }
    )


def test_sources_are_scored_by_the_first_pattern_that_they_match(recipe):
    pool = RewardPool(recipe.env, recipe.data.reward_choices)
    try:
        requests = [
            RewardRequest("sums", r"so \boxed{4.0}", "4"),
            RewardRequest("words/short", "4.0", "4"),
            RewardRequest("words/short", "4", "4"),
            RewardRequest("words/short", r"\boxed{4.0}", "4", reward="math {}"),
        ]
        assert [result.reward for result in asyncio.run(pool.score(requests))] == [1, 0, 1, 1]
    finally:
        pool.close()


def test_a_source_that_no_pattern_matches_is_named_before_the_first_step(recipe):
    recipe = recipe.with_values({"env.reward_by_source": {"sums": {"reward": "math"}}})
    with pytest.raises(UserError, match="env.reward_by_source: has no pattern that matches .*'words/x'"):
        load_run_prompts(recipe, byte_tokenizer(template("qwen3")))


def test_a_set_s_own_reward_judges_its_ground_truths_and_scores_it(recipe, tmp_path):
    bad = write(tmp_path, "bad", [("a", "words/x", "x^2 +"), ("b", "words/x", "4")])
    sets = {"bad": SetConfig(path=bad, reward="math", reward_kwargs={"answer_in_thinking": True})}
    recipe = recipe.with_values({"data.train.sets": sets})
    with pytest.raises(UserError, match=r"bad \(.*\): 1 of 2 ground truths .*bad/0.*\n.*env.reward=math reads"):
        load_usable(recipe.data.train, recipe, byte_tokenizer())
    kept, notes = load_usable(
        recipe.data.train, recipe.with_values({"data.on_bad_ground_truth": "drop"}), byte_tokenizer()
    )
    assert [record.prompt_id for record in kept] == ["bad/1"] and len(notes) == 1
    assert kept[0].reward == 'math {"answer_in_thinking": true}'
    with pytest.raises(UserError, match="env.reward: is 'nonsense'"):
        RewardPool(recipe.env, ["nonsense {}"])


@pytest.mark.parametrize("on", ["keep", "drop", "error"])
def test_training_prompts_that_are_validation_prompts_are_counted(recipe, on):
    recipe = recipe.with_values({"data.on_contamination": on})
    if on == "error":
        with pytest.raises(UserError, match="sums: 1 of 30 training prompts are validation prompts too, sums/3"):
            load_run_prompts(recipe, byte_tokenizer())
        return
    prompts = load_run_prompts(recipe, byte_tokenizer())
    assert prompts.count == (42 if on == "keep" else 41)
    (said,) = [note for note in prompts.notes if "validation prompts too" in note]
    assert "sums/3 among them" in said and ("left out" in said) == (on == "drop")
    drawn = {record.prompt_id for _ in range(60) for record in prompts.train.take(8)}
    assert ("sums/3" in drawn) == (on == "keep") and {"words/0", "sums/0"} <= drawn


def test_sets_that_are_read_as_they_are_needed_are_drawn_by_weight_too(recipe):
    recipe = recipe.with_values({"data.train.streaming": True, "data.shuffle_buffer": 5})
    prompts = load_run_prompts(recipe, byte_tokenizer())
    assert prompts.count is None and prompts.notes[-1].startswith("the first prompt, sums/")
    drawn = [record for _ in range(20) for record in prompts.train.take(4)]
    state = json.loads(json.dumps(prompts.train.state_dict()))
    assert {record.set_name for record in drawn} == {"sums", "words"}
    again = load_run_prompts(recipe, byte_tokenizer()).train
    assert again.load_state_dict(state)
    assert [again.take(4) for _ in range(10)] == [prompts.train.take(4) for _ in range(10)]
    assert again.find(["words/7"])["words/7"].ground_truth == "w7"


def test_the_first_prompt_is_told_as_the_model_sees_it(recipe):
    note = load_run_prompts(recipe, byte_tokenizer(template("qwen3"))).notes[-1]
    assert note == "the first prompt, sums/0, 7 tokens: '0 + 1 ='"


def test_show_and_stats_say_what_there_is(recipe):
    shown = data_report.show(recipe, 3)
    assert "sums/3" in shown and "\n3 + 1 =\n" in shown and "'4'" in shown
    assert "again/" in data_report.show(recipe, int(_kept(recipe)), "again")
    with pytest.raises(
        UserError, match=r"'nothing' is no set of the recipe\n  expected: one of sums, words, hard, again"
    ):
        data_report.show(recipe, 0, "nothing")
    with pytest.raises(UserError, match="sums: has no row 30"):
        data_report.show(recipe, 30)
    text = data_report.statistics(recipe)
    for part in ("train: sums", "rows             30", "words/short: 12", "validation: hard", "sums: 1 of 30, sums/3"):
        assert part in text, text
    strict = recipe.with_values({"data.max_input_seq_length": 7, "env.reward_by_source": {}, "env.reward": "math"})
    text = data_report.statistics(strict)
    assert "too long         20 of more than 7 tokens" in text
    assert "not scored       0 ground truths" in text
    (Path(recipe.data.train.sets["words"].path)).write_text(
        json.dumps({"prompt": "a", "data_source": "b", "reward_model": {"ground_truth": "x^2 +"}}) + "\n"
    )
    text = data_report.statistics(strict)
    assert "not scored       1 ground truths" in text and "words/0: 'x^2 +' cannot be parsed" in text


def _kept(recipe):
    return load_usable(recipe.data.validation, recipe, byte_tokenizer())[0].sets[1].numbers("row")[0]


def test_validation_sets_have_their_names_their_number_of_responses_and_their_temperature(recipe):
    validation, _ = load_usable(recipe.data.validation, recipe, byte_tokenizer())
    asked = []

    async def sample(self, records, repeats, label, **settings):
        asked.append((records[0].set_name, repeats, settings["temperature"]))
        samples = [
            Sample(f"{r.prompt_id}/{n}", r.prompt_id, np.ones(2), np.ones(2), np.zeros(2), np.zeros(2), "stop")
            for r in records
            for n in range(repeats)
        ]
        return type("Drawn", (), {"samples": samples})()

    class Parts:
        pass

    parts, logged = Parts(), []
    parts.recipe, parts.validation = recipe.with_values({"grpo.val_num_generations": 2}), validation
    parts.logger = type(
        "Logger",
        (),
        {"log_samples": lambda *a, **k: None, "log_problems": lambda self, step, found: logged.extend(found)},
    )()
    sampler = type("Sampler", (), {"sample": sample, "decode": lambda *a, **k: "x", "text": lambda *a: "x"})()
    assert Sampler.sample.__kwdefaults__.keys() >= {"temperature", "top_p"}
    metrics = asyncio.run(evaluation.evaluate(parts, sampler, 1))
    assert asked == [("hard", 3, 0.5), ("again", 2, None)]
    assert {problem.data_source for problem in logged} == {"hard", "again"} and len(logged) == 5
    assert "eval/hard/avg@3" in metrics and "eval/again/avg@2" in metrics


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.train.path": "x.jsonl"}, "data.train.path: is there beside data.train.sets"),
        ({"data.train.sets.sums.path": None}, "data.train.sets.sums.path: has no value"),
        ({"data.train.sets.sums.num_samples": 3}, "data.train.sets.sums: has num_samples"),
        ({"data.validation.sets.hard.weight": 2}, "data.validation.sets.hard.weight: is for training"),
        ({"data.validation.streaming": True}, "data.validation.streaming: is for training"),
        ({"env.rewards": {"math": 1.0}}, "env.reward_by_source: is there beside env.rewards"),
        ({"data.train.sets.a/b": {"path": "x"}}, "data.train.sets: has a set 'a/b'"),
    ],
)
def test_what_does_not_go_together_is_named(recipe, changes, message):
    content = recipe.model_dump()
    for name, value in changes.items():
        *parents, leaf = name.split(".")
        group = content
        for parent in parents:
            group = group[parent]
        group[leaf] = value
    with pytest.raises(UserError, match=message):
        validate(Recipe.model_validate(content))


def test_a_place_that_is_not_there_names_its_set(recipe, tmp_path):
    sets = {"gone": SetConfig(path=[str(tmp_path / "sums.jsonl"), str(tmp_path / "no*.jsonl")])}
    with pytest.raises(UserError, match=r"data\.train\.sets\.gone\.path: .*no\*\.jsonl does not exist"):
        preflight.check_files(recipe.with_values({"data.train.sets": sets}))
