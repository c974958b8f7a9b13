"""The public sets by name: source on the hub, columns, and the row of veRL's schema that each becomes.

Column names are those of the sets' own pages on the Hugging Face hub (`https://huggingface.co/datasets/<source>`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

BOXED = "Let's think step by step and output the final answer within \\boxed{}."
"""veRL's instruction for mathematics (examples/data_preprocess)."""
FENCED = "Write the whole program in one ```python block."


@dataclass(frozen=True)
class PublicSet:
    """One set and its transformation."""

    source: str
    """owner/name on the hub."""
    split: str
    columns: tuple[str, ...]
    """What a row must have."""
    transform: Callable[[Row, str], dict[str, Any] | None]
    """(row, name of the set) → a row of veRL's schema without `extra_info.index`; None drops it."""
    reward: str
    """The recipe's `env.reward` for it."""
    config: str | None = None
    """The hub's name of a part of the set."""
    unique_prompts: bool = False
    """Keep the first of rows with the same prompt."""


def _row(name: str, text: str, ground_truth: Any, ability: str, **extra: Any) -> dict[str, Any]:
    return {
        "data_source": name,
        "prompt": [{"role": "user", "content": text}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": extra,
    }


def mathematics(problem: str, answer: str = "answer") -> Callable[[Row, str], dict[str, Any]]:
    """Columns of the problem and the answer → the problem with `BOXED` behind it."""

    def transform(row: Row, name: str) -> dict[str, Any]:
        return _row(name, f"{row[problem].strip()}\n\n{BOXED}", str(row[answer]).strip(), "math")

    return transform


def as_it_is(row: Row, name: str) -> dict[str, Any]:
    """A row that is in veRL's schema already."""
    truth = row["reward_model"]["ground_truth"]
    prompt = [{"role": part["role"], "content": part["content"]} for part in row["prompt"]]
    return {**_row(name, "", truth, row.get("ability") or "math"), "prompt": prompt}


DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_BEHIND = '\n\nRemember to put your answer on its own line after "Answer:".'
"""What DAPO-Math-17k writes around a problem."""
DAPO_BOXED = " Please reason step by step, and put your final answer within \\boxed{}."
"""What the VESPO paper's script puts in its place (FloyedShen/VESPO, recipe/vespo/tools/preprocess_datasets.py)."""


def dapo_math(row: Row, name: str) -> dict[str, Any]:
    """A problem of DAPO-Math-17k with the paper's instruction for DAPO's."""
    made = as_it_is(row, name)
    first = made["prompt"][0]
    first["content"] = first["content"].replace(DAPO_BEFORE, "").replace(DAPO_BEHIND, DAPO_BOXED)
    return made


def eurus_code(row: Row, name: str) -> dict[str, Any] | None:
    """The coding half of Eurus-2-RL-Data: tests are `{"inputs", "outputs"}` in JSON."""
    return as_it_is(row, name) if row["ability"] == "code" else None


def humaneval_plus(row: Row, name: str) -> dict[str, Any]:
    """A function to complete; its test defines `check(candidate)`."""
    text = f"Complete this function.\n\n```python\n{row['prompt'].rstrip()}\n```\n\n{FENCED}"
    truth = json.dumps({"test": f"{row['test']}\n\ncheck({row['entry_point']})\n"})
    return _row(name, text, truth, "code", task_id=row["task_id"])


def mbpp_plus(row: Row, name: str) -> dict[str, Any]:
    """A task in words with its three public assertions; the hidden test is a script."""
    examples = "\n".join(row["test_list"])
    text = f"{row['prompt'].strip()}\n\nYour code should pass:\n\n```python\n{examples}\n```\n\n{FENCED}"
    return _row(name, text, json.dumps({"test": row["test"]}), "code", task_id=str(row["task_id"]))


_VERL = ("prompt", "reward_model")
SETS: dict[str, PublicSet] = {
    # Each of its 17,000 problems is there about a hundred times.
    "dapo_math": PublicSet("BytedTsinghua-SIA/DAPO-Math-17k", "train", _VERL, dapo_math, "math", unique_prompts=True),
    "deepscaler": PublicSet(
        "agentica-org/DeepScaleR-Preview-Dataset", "train", ("problem", "answer"), mathematics("problem"), "math"
    ),
    "aime24": PublicSet("HuggingFaceH4/aime_2024", "train", ("problem", "answer"), mathematics("problem"), "math"),
    "aime25": PublicSet("math-ai/aime25", "test", ("problem", "answer"), mathematics("problem"), "math"),
    "amc23": PublicSet("math-ai/amc23", "test", ("question", "answer"), mathematics("question"), "math"),
    "math500": PublicSet("HuggingFaceH4/MATH-500", "test", ("problem", "answer"), mathematics("problem"), "math"),
    "eurus_code": PublicSet("PRIME-RL/Eurus-2-RL-Data", "train", (*_VERL, "ability"), eurus_code, "code"),
    "humaneval_plus": PublicSet(
        "evalplus/humanevalplus", "test", ("task_id", "prompt", "entry_point", "test"), humaneval_plus, "code"
    ),
    "mbpp_plus": PublicSet("evalplus/mbppplus", "test", ("task_id", "prompt", "test_list", "test"), mbpp_plus, "code"),
}
