"""Eurus to train on, LiveCodeBench to validate: prepared, loaded, shown to the model, scored by the run's rewards."""

from __future__ import annotations

import asyncio
import json

import pytest
from byte_tokenizer import byte_tokenizer, template
from model_config import write_config
from wall import needs_wall

from vespo_megatron.data.public.prepare import prepare
from vespo_megatron.launch.prompts import load_run_prompts
from vespo_megatron.recipe.rules import validate
from vespo_megatron.recipe.schema import Recipe, SetConfig
from vespo_megatron.rewards import RewardPool, RewardRequest

TESTS = {"fn_name": "half", "inputs": ["4", "5"], "outputs": ["[2.0]", "[2.5]"]}
EURUS = {
    "data_source": "apps",
    "prompt": [{"content": "Think.", "role": "system"}, {"content": "Halve n. Write Python code.", "role": "user"}],
    "ability": "code",
    "reward_model": {"ground_truth": json.dumps(TESTS), "style": "rule"},
    "extra_info": {"index": 0, "split": "dummy"},
}
LIVE = {
    "question_title": "Half",
    "question_content": "Print half of n.",
    "platform": "atcoder",
    "question_id": "abc1_a",
    "contest_id": "abc1",
    "contest_date": "2025-02-01T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "4\n", "output": "2.0\n", "testtype": "stdin"}]),
    "private_test_cases": json.dumps([{"input": "5\n", "output": "2.5\n", "testtype": "stdin"}]),
    "metadata": "{}",
}


@pytest.fixture
def recipe(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    write_config(model, vocab_size=512, max_position_embeddings=2048)
    byte_tokenizer(template("qwen3")).save_pretrained(model)
    paths = {}
    for name, row in (("eurus_code", EURUS), ("livecodebench_v6", LIVE)):
        copy = tmp_path / f"{name}.jsonl"
        copy.write_text(json.dumps(row) + "\n")
        paths[name] = str(prepare(name, tmp_path / "data", local=copy))
    return Recipe().with_values(
        {
            "policy.model_name": str(model),
            "policy.max_total_sequence_length": 1536,
            "data.max_input_seq_length": 1000,
            "data.train.path": paths["eurus_code"],
            "data.validation.sets": {"live": SetConfig(path=paths["livecodebench_v6"], num_samples=2)},
            "env.reward": "code",
            "env.reward_kwargs": {"test_timeout": 60.0},
            "env.timeout": 300.0,
        }
    )


@needs_wall
def test_from_the_hub_s_rows_to_prompts_and_scores(recipe):
    validate(recipe)
    tokenizer = byte_tokenizer(template("qwen3"))
    prompts = load_run_prompts(recipe, tokenizer)
    trained, held_out = prompts.train.first(), prompts.validation[0]
    shown = tokenizer.decode(list(trained.prompt_ids))
    assert "Think." in shown and "Halve n. Write Python code." in shown
    assert "Print half of n." in tokenizer.decode(list(held_out.prompt_ids))
    answers = [
        (trained, "def half(n): return n / 2", 1.0),
        (trained, "def half(n): return n // 2", 0.0),
        (held_out, "print(int(input()) / 2)", 1.0),
        (held_out, "print(int(input()) / 2 + 1e-9)", 0.0),  # LiveCodeBench rounds nothing
    ]
    pool = RewardPool(recipe.env, recipe.data.reward_choices)
    try:
        requests = [
            RewardRequest(each.data_source, f"```python\n{program}\n```", each.ground_truth, each.extra_info)
            for each, program, _ in answers
        ]
        results = asyncio.run(pool.score(requests))
    finally:
        pool.close()
    assert [result.reward for result in results] == [wanted for *_, wanted in answers]
