"""avg@k, pass@k and maj@k of problems that were answered n times each, and how sure one can be of them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

SOLVED = 0.5
"""A response solves its problem when its reward is above this: rewards are 0 and 1, −1 and 1, or shares of tests."""
_DRAWS = 200
"""Subsets that maj@k is averaged over, for k below the number of responses."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Problem:
    """One problem and its n responses."""

    prompt_id: str
    data_source: str
    ground_truth: Any
    rewards: tuple[float, ...]
    answers: tuple[str | None, ...]
    """What each response gives as its answer; None where it gives none."""
    lengths: tuple[int, ...]
    """Tokens."""
    finish_reasons: tuple[str, ...]
    group: str = ""
    """What it is told apart by within its set; "" where nothing does."""
    greedy: float | None = None
    """The reward of its greedy response, where one was drawn."""

    @property
    def solved(self) -> int:
        """How many responses solve it."""
        return sum(reward > SOLVED for reward in self.rewards)


@dataclass(frozen=True)
class Score:
    """A mean over problems with its 95% interval, by bootstrap over the problems."""

    value: float
    low: float
    high: float


def average(problem: Problem) -> float:
    """avg@n: the mean reward of its responses."""
    return float(np.mean(problem.rewards))


def pass_at(problem: Problem, k: int) -> float:
    """Probability that k of its responses, drawn without replacement, hold a solution: 1 − C(n−c, k) / C(n, k).

    Unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1). Raises ValueError for k above n.
    """
    n = len(problem.rewards)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} responses")
    return 1.0 - math.comb(n - problem.solved, k) / math.comb(n, k)


def majority_at(problem: Problem, k: int) -> float:
    """Whether the most frequent answer of k responses solves it (ties: the one given first); averaged over subsets.

    All responses in their order for k = n, else subsets drawn with a seed of the problem's own. Responses without an
    answer have no vote. The answer's reward is that of the response that gave it first.
    """
    n = len(problem.rewards)
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k} of {n} responses")
    if k == n:
        return _majority(problem, range(n))
    chance = random.Random(problem.prompt_id)
    return float(np.mean([_majority(problem, sorted(chance.sample(range(n), k))) for _ in range(_DRAWS)]))


def _majority(problem: Problem, members: Sequence[int]) -> float:
    votes = Counter(problem.answers[i] for i in members if problem.answers[i] is not None)
    if not votes:
        return 0.0
    winner = votes.most_common(1)[0][0]  # of equals the one that was counted first
    return float(next(problem.rewards[i] for i in members if problem.answers[i] == winner) > SOLVED)


def score(problems: Sequence[Problem], measure: Callable[[Problem], float]) -> Score:
    """The mean of `measure`, and where it would lie with other problems of the same kind."""
    values = np.array([measure(problem) for problem in problems])
    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return Score(mean, mean if len(values) > 1 else math.nan, mean if len(values) > 1 else math.nan)
    from scipy.stats import bootstrap

    interval = bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Score(mean, float(interval.low), float(interval.high))


def powers_to(n: int) -> list[int]:
    """1, 2, 4, … and n."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})


def summary(problems: Sequence[Problem]) -> dict[str, Score]:
    """avg@n, pass@k for powers of two up to n, maj@n where answers were found."""
    n = min(len(problem.rewards) for problem in problems)
    scores = {f"avg@{n}": score(problems, average)}
    if n > 1:
        scores |= {f"pass@{k}": score(problems, partial(pass_at, k=k)) for k in powers_to(n)[1:]}
        if any(answer is not None for problem in problems for answer in problem.answers):
            scores[f"maj@{n}"] = score(problems, lambda problem: majority_at(problem, n))
    return scores


def by_group(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """Problems that have a group, by it, in its order."""
    groups: dict[str, list[Problem]] = {}
    for problem in sorted(problems, key=lambda problem: problem.group):
        if problem.group:
            groups.setdefault(problem.group, []).append(problem)
    return groups


def by_set(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """Problems by their data source, in the order they came in."""
    sets: dict[str, list[Problem]] = {}
    for problem in problems:
        sets.setdefault(problem.data_source, []).append(problem)
    return sets
