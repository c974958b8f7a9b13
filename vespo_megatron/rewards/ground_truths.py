"""Ground truths before a run: those that give no response a score, found when data is loaded."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards import functions, mathematics
from vespo_megatron.rewards.answers import accepted
from vespo_megatron.rewards.pool import RewardPool, RewardRequest

_PLAIN = re.compile(r"-?(?:\d+(?:\.\d+)?|\\[dt]?frac\{\d+\}\{\d+\}|\d+/\d+)")
"""What Math-Verify surely reads, as most ground truths are. Of the others 10,000 take a core about a minute."""
_DEADLINE = 60.0
"""Seconds for one, at least: it guards against a parser that hangs, not against a machine that is busy."""
_PER_PROCESS = 200
"""Ground truths that are worth a process of their own."""


def unreadable(env: EnvConfig, truths: Sequence[Any]) -> list[str | None]:
    """Of each ground truth, why the recipe's reward gives no response a score for it; None where it can.

    Rewards of `functions.UNREADABLE` are asked; others judge their own. What Math-Verify has to parse is parsed in
    processes that end with this, within a deadline.
    """
    reasons: list[str | None] = [None] * len(truths)
    for name in env.rewards or [env.reward]:
        judge = functions.UNREADABLE.get(name)
        if judge is mathematics.unreadable:
            found = _parsed(truths, env)
        elif judge is not None:
            found = [judge(truth) for truth in truths]
        else:
            continue
        reasons = [first or second for first, second in zip(reasons, found, strict=True)]
    return reasons


def readable(data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """As a reward that judges the ground truth, so that a pool's deadlines hold: 1 when Math-Verify reads it."""
    return float(mathematics.unreadable(ground_truth) is None)


def _parsed(truths: Sequence[Any], env: EnvConfig) -> list[str | None]:
    keys = [json.dumps(truth, default=str) for truth in truths]
    reasons: dict[str, str | None] = {}
    to_parse: dict[str, Any] = {}
    for key, truth in zip(keys, truths, strict=True):
        answers = accepted(truth)
        if not answers:
            reasons[key] = "is no answer"
        elif not all(_PLAIN.fullmatch(answer.strip()) for answer in answers):
            to_parse[key] = truth
    if not to_parse:
        return [reasons.get(key) for key in keys]
    workers = min(os.cpu_count() or 1, 1 + len(to_parse) // _PER_PROCESS)
    pool = RewardPool(
        EnvConfig(reward=f"{__name__}:readable", timeout=max(env.timeout, _DEADLINE), num_workers=workers)
    )
    try:
        results = asyncio.run(pool.score([RewardRequest("", "", truth) for truth in to_parse.values()]))
    finally:
        pool.close()
    for key, result in zip(to_parse, results, strict=True):
        reasons[key] = None if result.reward else "takes too long to parse" if result.unscored else "cannot be parsed"
    return [reasons.get(key) for key in keys]
