"""Does a response have the form that was asked for?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from vespo_megatron.errors import UserError

DEFAULT_PATTERN = r"(?s).*\\boxed\{.+\}.*"
"""A boxed answer somewhere."""


def format_reward(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any],
    *,
    pattern: str = DEFAULT_PATTERN,
    once: list[str] | tuple[str, ...] = (),
) -> float:
    """1 when the whole response matches `pattern` and holds each text of `once` exactly once, else 0.

    Raises:
        UserError: `pattern` is no regular expression.
    """
    matches = _compiled(pattern).fullmatch(solution_str) is not None
    return float(matches and all(solution_str.count(text) == 1 for text in once))


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"is no regular expression ({error})", where="env.reward_kwargs.format.pattern") from None
