"""Reward functions, all with veRL's signature: `(data_source, solution_str, ground_truth, extra_info) → float | dict`.

A dict must hold `score`; its other numbers are logged as parts of the reward.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards.code import choose_wall, code_reward
from vespo_megatron.rewards.format import format_reward
from vespo_megatron.rewards.remote import remote_reward

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


BUILT_IN: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "math": math,
    "format": format_reward,
    "code": code_reward,
    "remote": remote_reward,
}
INLINE = {"exact_match", "format"}
"""Too quick and too plain to need a process of their own."""


def of_recipe(env: EnvConfig) -> RewardFunction:
    """The recipe's reward: one function with its arguments, or the weighted sum of several, each logged as a part.

    Raises:
        UserError: there is no such reward, or arguments for one that is not used.
    """
    if not env.rewards:
        return partial(find(env.reward), **env.reward_kwargs)
    unused = sorted(set(env.reward_kwargs) - set(env.rewards))
    if unused:
        raise UserError(
            f"has arguments for {', '.join(unused)}",
            where="env.reward_kwargs",
            expected=f"one entry per reward of env.rewards: {', '.join(env.rewards)}",
        )
    terms = {
        name: (float(weight), partial(find(name), **env.reward_kwargs.get(name, {})))
        for name, weight in env.rewards.items()
    }

    def weighted_sum(*arguments: Any) -> dict[str, float]:
        parts: dict[str, float] = {}
        total = 0.0
        for name, (weight, function) in terms.items():
            answer = function(*arguments)
            short = name.rpartition(":")[2]
            if isinstance(answer, Mapping):
                parts |= {f"{short}_{key}": value for key, value in answer.items() if key != "score"}
                answer = answer["score"]
            parts[short] = float(answer)
            total += weight * float(answer)
        return parts | {"score": total}

    return weighted_sum


def fence(env: EnvConfig) -> str | None:
    """What programs of responses are fenced by, where the recipe's reward runs any.

    Raises:
        UserError: nothing fences them here, and the recipe does not allow that.
    """
    if "code" not in (env.rewards or [env.reward]):
        return None
    arguments = env.reward_kwargs.get("code", {}) if env.rewards else env.reward_kwargs
    return choose_wall(allow_unsafe_code=bool(arguments.get("allow_unsafe_code", False))).description


def find(name: str) -> RewardFunction:
    """A built-in reward, or `package.module:function`, without arguments.

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
