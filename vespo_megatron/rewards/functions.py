"""Reward functions, all with veRL's signature: `(data_source, solution_str, ground_truth, extra_info) → float | dict`.

A dict must hold `score`; its other numbers are logged as parts of the reward.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards import code_tests, mathematics
from vespo_megatron.rewards.answers import accepted, after_thinking, last_boxed
from vespo_megatron.rewards.code import choose_wall, code_reward
from vespo_megatron.rewards.code_judges import judge_of
from vespo_megatron.rewards.format import format_reward
from vespo_megatron.rewards.judge import judge_reward
from vespo_megatron.rewards.mathematics import math
from vespo_megatron.rewards.remote import remote_reward

RewardFunction = Callable[..., float | Mapping[str, float]]


def exact_match(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any],
    *,
    answer_in_thinking: bool = False,
) -> float:
    r"""1 when the last `\boxed{…}` (or the whole response without one) is the ground truth, blanks aside.

    Args:
        answer_in_thinking: whether what stands before `</think>` is read as well.
    """
    text = solution_str if answer_in_thinking else after_thinking(solution_str)
    boxed = last_boxed(text)
    answer = "".join((text if boxed is None else boxed).split())
    return float(any(answer == "".join(truth.split()) for truth in accepted(ground_truth)))


def none(data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """0: an environment gives all the reward there is."""
    return 0.0


BUILT_IN: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "math": math,
    "format": format_reward,
    "code": code_reward,
    "remote": remote_reward,
    "judge": judge_reward,
    "none": none,
}
UNREADABLE: dict[str, Callable[[Any], str | None]] = {
    "exact_match": lambda truth: None if accepted(truth) else "is no answer",
    "math": mathematics.unreadable,
    "code": code_tests.unreadable,
}
"""Reward → why a ground truth can give no response a score above 0; None where it can. Others judge their own."""
INLINE = {"exact_match", "format", "none"}
"""Too quick and too plain to need a process of their own."""


def names_of(env: EnvConfig, choices: Iterable[str] = ()) -> set[str]:
    """The rewards that a run asks, those of `choices` (`SetConfig.reward_choice`) among them."""
    by_source = {choice.reward for choice in env.reward_by_source.values()}
    own = by_source or set(env.rewards) or {env.reward}
    return own | {choice.partition(" ")[0] for choice in choices if choice}


def is_inline(env: EnvConfig, choices: Iterable[str] = ()) -> bool:
    """Whether the rewards are all scored where they are asked for, without workers."""
    return names_of(env, choices) <= INLINE


@cache
def chosen(choice: str) -> RewardFunction:
    """The reward of a `SetConfig.reward_choice`. Raises `UserError` where there is none such."""
    name, _, arguments = choice.partition(" ")
    return partial(find(name), **json.loads(arguments or "{}"))


def pattern_of(env: EnvConfig, data_source: str) -> str | None:
    """The first pattern of `env.reward_by_source` that a source matches."""
    return next((each for each in env.reward_by_source if fnmatch.fnmatchcase(data_source, each)), None)


def of_recipe(env: EnvConfig) -> RewardFunction:
    """The recipe's reward: a function with its arguments, a weighted sum of several, or one for each data source.

    Of a sum each term is logged as a part.

    Raises:
        UserError: there is no such reward, or arguments for one that is not used.
    """
    if env.reward_by_source:
        return _by_source(env)
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


def _by_source(env: EnvConfig) -> RewardFunction:
    functions = {
        pattern: partial(find(choice.reward), **choice.reward_kwargs)
        for pattern, choice in env.reward_by_source.items()
    }

    def of_its_source(data_source: str, *arguments: Any) -> float | Mapping[str, float]:
        pattern = pattern_of(env, data_source)
        if pattern is None:
            raise UserError(f"no pattern matches {data_source!r}", where="env.reward_by_source")
        return functions[pattern](data_source, *arguments)

    return of_its_source


def fence(env: EnvConfig, choices: Iterable[str] = ()) -> str | None:
    """What programs of responses are fenced by, where the recipe's reward runs any.

    Raises:
        UserError: nothing fences them here, and the recipe does not allow that; a judge of programs that is none.
    """
    of_sets = [choice.partition(" ") for choice in choices]
    arguments = [json.loads(text or "{}") for name, _, text in of_sets if name == "code"]
    if env.reward_by_source:
        arguments += [each.reward_kwargs for each in env.reward_by_source.values() if each.reward == "code"]
    elif "code" in env.rewards:
        arguments.append(env.reward_kwargs.get("code", {}))
    elif not env.rewards and env.reward == "code":
        arguments.append(env.reward_kwargs)
    if not arguments:
        return None
    for each in arguments:
        judge_of("", each.get("judge"))
    return choose_wall(allow_unsafe_code=all(each.get("allow_unsafe_code", False) for each in arguments)).description


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
