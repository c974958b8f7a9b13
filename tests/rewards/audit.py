"""The tables that rewards are audited on, and how wrong a reward is on one of them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """A response, and whether it is right."""

    kind: str
    truth: Any
    response: str
    right: bool


@dataclass(frozen=True)
class Rates:
    """Shares of a table's cases that are judged wrong."""

    false_negatives: float
    """Of the right responses, those that score nothing."""
    false_positives: float
    """Of the wrong responses, those that score."""
    misjudged: tuple[Case, ...]


def math_pairs() -> list[Case]:
    """Answers to mathematical problems, by kind."""
    return [
        Case(kind, truth, response.replace("⏎", "\n").replace("{filler}", "and so on " * 500), right)
        for kind, rows in tomllib.loads((_HERE / "math_pairs.toml").read_text()).items()
        for truth, response, right in rows
    ]


def programs() -> list[Case]:
    """Programs, by the public set whose form their tests have."""
    return [
        Case(form, row["truth"], row["response"].replace("§", "```"), row["right"])
        for form, rows in tomllib.loads((_HERE / "programs.toml").read_text()).items()
        for row in rows
    ]


def rates(cases: Iterable[Case], scores: Iterable[float]) -> Rates:
    """How wrong `scores` are; a score above one half counts as right."""
    judged = [(case, score > 0.5) for case, score in zip(cases, scores, strict=True)]
    return Rates(
        *(
            sum(found != right for case, found in judged if case.right is right)
            / sum(case.right is right for case, _ in judged)
            for right in (True, False)
        ),
        tuple(case for case, found in judged if case.right != found),
    )
