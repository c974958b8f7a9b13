"""Reward functions, all with veRL's signature: `(data_source, solution_str, ground_truth, extra_info) → float | dict`.

A dict must hold `score`; its other numbers are logged as parts of the reward.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from vespo_megatron.errors import UserError

RewardFunction = Callable[..., float | Mapping[str, float]]
_TAIL = 4096
"""Characters of a response that are read for an answer: answers stand at the end."""


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{…}`, braces balanced; None when there is none."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        depth = 0
        for position in range(start + len(r"\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len(r"\boxed{") : position]
        start = text.rfind(r"\boxed{", 0, start)
    return None


def exact_match(data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    r"""1 when the last `\boxed{…}` (or the whole response without one) is the ground truth, blanks aside."""
    boxed = last_boxed(solution_str[-_TAIL:])
    answer = solution_str if boxed is None else boxed
    return float("".join(answer.split()) == "".join(str(ground_truth).split()))


def math(data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """1 when Math-Verify finds the response's answer equal to the ground truth. Runs only under a deadline."""
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the deadline it is not given, once per text
    gold = parse(rf"\boxed{{{ground_truth}}}", parsing_timeout=None)
    answer = parse(solution_str[-_TAIL:], parsing_timeout=None)
    return float(bool(gold) and verify(gold, answer, timeout_seconds=None))


BUILT_IN: dict[str, RewardFunction] = {"exact_match": exact_match, "math": math}
INLINE = {"exact_match"}
"""Too quick and too plain to need a process of their own."""


def find(name: str) -> RewardFunction:
    """A built-in reward, or `package.module:function`.

    Raises:
        UserError: there is no such reward.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, _, function = name.partition(":")
    if not function:
        known = f"{', '.join(BUILT_IN)}, or package.module:function"
        raise UserError(f"is {name!r}", where="env.reward", expected=known)
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{name!r} cannot be imported ({error})", where="env.reward", expected="package.module:function"
        ) from None
