"""Who judges a program's answers: a set's own judge where it has one, by the data source, else a contest's.

| judge | data sources | what it does otherwise than a contest's |
|---|---|---|
| `contest` | all others | |
| `prime` | Eurus and the sets it is made of | looks into a list of one value; deep recursion |
| `livecodebench` | LiveCodeBench | line by line, no rounding, JSON's own types, first failure ends it; deep recursion |

Sources: veRL's `verl/utils/reward_score/prime_code/testing_util.py` for `prime`, which takes the first value of every
list, not of lists of one alone; LiveCodeBench's `lcb_runner/evaluation/testing_util.py` for `livecodebench`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.rewards.code_outputs import same_lines, same_output, same_value


@dataclass(frozen=True)
class Judge:
    """How answers are compared, and what a program may count on."""

    same_output: Callable[[str, str], bool] = same_output
    """(printed, wanted)"""
    same_value: Callable[[Any, Any], bool] = same_value
    """(result, wanted), both as JSON has them"""
    takes_text: bool = True
    """Whether a function may return the text of the JSON that is wanted."""
    unwraps: bool = False
    """Whether `[3]` in lines of JSON wants 3 as well."""
    exact_types: bool = False
    """Whether a result must be of JSON's own types; an outermost tuple passes for a list."""
    ends_at_failure: bool = False
    """Whether tests after the first failure are left out."""
    recursion_limit: int | None = None
    """Python's, before the program begins; None leaves it."""


JUDGES = {
    "contest": Judge(),
    "prime": Judge(unwraps=True, recursion_limit=600_000),
    "livecodebench": Judge(
        same_output=same_lines,
        same_value=lambda value, wanted: bool(value == wanted),
        takes_text=False,
        exact_types=True,
        ends_at_failure=True,
        recursion_limit=50_000,
    ),
}
_OF_SOURCES = {
    "livecodebench*": "livecodebench",
    "eurus*": "prime",
    "PRIME-RL/Eurus*": "prime",
    # The data sources of Eurus' own rows.
    **dict.fromkeys(("apps", "codecontests", "codeforces", "taco"), "prime"),
}


def judge_of(data_source: str, name: str | None = None) -> Judge:
    """The judge that is named, else the data source's. Raises `UserError` where there is none of that name."""
    if name is None:
        found = (judge for pattern, judge in _OF_SOURCES.items() if fnmatch.fnmatchcase(data_source, pattern))
        name = next(found, "contest")
    if name not in JUDGES:
        raise UserError(f"is {name!r}", where="judge (of the code reward)", expected=f"one of {', '.join(JUDGES)}")
    return JUDGES[name]
