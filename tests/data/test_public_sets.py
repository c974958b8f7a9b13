"""Public sets: small fixtures in the hub's own columns become prompts that load, tokenise and can be scored."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest
from wall import needs_wall

from vespo_megatron.cli import main
from vespo_megatron.data.public.prepare import prepare
from vespo_megatron.data.public.sets import SETS
from vespo_megatron.errors import UserError
from vespo_megatron.rewards.functions import find

VERL = {"data_source": "x", "ability": "math", "reward_model": {"style": "rule", "ground_truth": "34"}}


def message(text):
    return [{"role": "user", "content": text}]


ROWS = {
    "dapo_math": [VERL | {"prompt": message("1 + 33?")}, VERL | {"prompt": message("34 + 0?")}] * 3,
    "deepscaler": [{"problem": "1 + 33?", "answer": "34", "solution": "…"}],
    "aime24": [{"id": 60, "problem": "1 + 33?", "solution": "…", "answer": "34", "url": "…", "year": "2024"}],
    "aime25": [{"id": "0", "problem": "1 + 33?", "answer": "34"}],
    "amc23": [{"id": 0, "question": "1 + 33?", "answer": 34.0, "url": "…"}],
    "math500": [{"problem": "1 + 33?", "answer": "34", "subject": "Algebra", "level": 1, "unique_id": "a/1"}],
    "eurus_code": [
        VERL
        | {
            "prompt": message("Add."),
            "ability": "code",
            "reward_model": {"style": "rule", "ground_truth": json.dumps({"inputs": ["1 33"], "outputs": ["34"]})},
        },
        VERL | {"prompt": message("1 + 33?")},
    ],
    "humaneval_plus": [
        {
            "task_id": "HumanEval/0",
            "prompt": "def add(a, b):\n    '''Add.'''\n",
            "entry_point": "add",
            "canonical_solution": "    return a + b\n",
            "test": "def check(candidate):\n    assert candidate(1, 33) == 34\n",
        }
    ],
    "mbpp_plus": [
        {
            "task_id": 2,
            "prompt": "Write a function that adds.",
            "code": "…",
            "test_list": ["assert add(1, 2) == 3"],
            "test_imports": [],
            "test": "for a in range(3):\n    assert add(a, 33) == a + 33\n",
        }
    ],
}
"""Rows as the hub has them."""
ANSWERS = {
    "math": (r"So it is \boxed{34}.", r"\boxed{35}"),
    "eurus_code": ("```python\nprint(sum(map(int, input().split())))\n```", "```python\nprint(3)\n```"),
    "humaneval_plus": (
        "```python\ndef add(a, b):\n    return a + b\n```",
        "```python\ndef add(a, b):\n    return 34 if a else 0\n```\nor\n```python\ndef add(a, b): return a\n```",
    ),
    "mbpp_plus": ("```python\ndef add(a, b): return a + b\n```", "```python\ndef add(a, b): return 33\n```"),
}
"""A right answer and a wrong one."""


@pytest.fixture
def copy(tmp_path):
    def write(name, rows=None):
        path = tmp_path / "copy" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(json.dumps(row) for row in (ROWS[name] if rows is None else rows)))
        return path

    return write


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_wall] * (one.reward == "code")) for name, one in SETS.items()]
)
def test_a_row_becomes_a_prompt_whose_answers_are_told_apart(name, copy, tmp_path):
    path = prepare(name, tmp_path / "out", local=copy(name))
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert len(rows) == {"dapo_math": 2}.get(name, 1), "duplicates and the other half of a set are dropped"
    row = rows[0]
    assert row["data_source"] == name and row["prompt"][0]["role"] == "user"
    assert row["extra_info"]["index"] == 0
    score = find(SETS[name].reward)
    found = []
    for text in ANSWERS.get(name, ANSWERS["math"]):
        value = score(name, text, row["reward_model"]["ground_truth"], row["extra_info"])
        found.append(value["score"] if isinstance(value, dict) else value)
    assert found == [1.0, 0.0]


def test_prepared_prompts_load_as_a_dataset(copy, tmp_path, tiny_recipe):
    from transformers import AutoTokenizer

    from vespo_megatron.data.prompts import load_prompts

    tiny = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe" / "build" / "model"
    recipe = tiny_recipe.with_values(
        {
            "data.train.path": str(prepare("math500", tmp_path, local=copy("math500"))),
            "data.max_input_seq_length": 120,
            "policy.model_name": str(tiny),
        }
    )
    (record,) = load_prompts(recipe.data.train, recipe, AutoTokenizer.from_pretrained(tiny))
    assert record.ground_truth == "34"


def test_a_set_is_made_once_and_again_when_anything_changes(copy, tmp_path):
    source = copy("aime24")
    path = prepare("aime24", tmp_path / "out", local=source)
    facts = json.loads(path.with_suffix(".json").read_text())
    assert (facts["rows"], facts["reward"], facts["set"]) == (1, "math", "aime24")
    made = path.stat().st_mtime_ns
    assert prepare("aime24", tmp_path / "out", local=source).stat().st_mtime_ns == made
    path.write_bytes(path.read_bytes()[:-1])  # damaged since
    assert prepare("aime24", tmp_path / "out", local=source).stat().st_mtime_ns != made
    assert json.loads(path.with_suffix(".json").read_text())["sha256"] == facts["sha256"]
    assert not list((tmp_path / "out").glob("*.partial"))


@pytest.mark.parametrize(
    ("rows", "message_"),
    [
        ([{"problem": "x"}], "has no column answer"),
        ([{"problem": None, "answer": "1"}], "aime24, row 0: is not as expected"),
        ([{"problem": "x", "answer": "1"}, {"problem": 3, "answer": "1"}], "aime24"),
    ],
)
def test_a_copy_that_is_something_else_is_refused(rows, message_, copy, tmp_path):
    with pytest.raises(UserError, match=message_):
        prepare("aime24", tmp_path / "out", local=copy("aime24", rows))
    assert not (tmp_path / "out" / "aime24.parquet").exists()


def test_without_the_hub_the_local_copy_is_named(monkeypatch, tmp_path, capsys):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert main(["data", "prepare", "dapo_math", "--output", str(tmp_path)]) == 2
    assert "--from" in capsys.readouterr().err
    assert main(["data", "prepare", "gsm9k", "--output", str(tmp_path)]) == 2
    assert "dapo_math" in capsys.readouterr().err
    assert main(["data", "prepare", "aime24", "--from", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "holds no data" in capsys.readouterr().err


def test_dapo_math_asks_for_a_box_as_the_paper_does():
    from vespo_megatron.data.public.sets import DAPO_BEFORE, DAPO_BEHIND, SETS

    row = VERL | {"prompt": [{"role": "user", "content": f"{DAPO_BEFORE}1 + 33?{DAPO_BEHIND}"}]}
    (message,) = SETS["dapo_math"].transform(row, "dapo_math")["prompt"]
    assert message["content"] == "1 + 33? Please reason step by step, and put your final answer within \\boxed{}."
    assert row["prompt"][0]["content"].startswith("Solve"), "the row that was given is as it was"
