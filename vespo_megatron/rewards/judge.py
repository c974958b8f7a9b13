"""A reward that a language model gives: an OpenAI-compatible endpoint is asked for a number, by its URL."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from string import Template
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.rewards.answers import after_thinking
from vespo_megatron.rewards.remote import post

PROMPT = """Judge a response by its reference.

Reference: $ground_truth

Response:
$solution

How well does the response agree with the reference? Answer with one number from 0 (not at all) to $best (fully)."""
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w]|\.\d)")


def judge_reward(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any],
    *,
    url: str,
    model: str,
    prompt: str = PROMPT,
    system: str = "",
    best: float = 10.0,
    max_tokens: int = 512,
    temperature: float = 0.0,
    api_key_variable: str = "",
    retries: int = 5,
    backoff: float = 0.5,
    timeout: float = 30.0,
) -> float:
    """The last number of the judge's answer over `best`: from 0 to 1.

    What the judge writes before `</think>` is not read. An answer without a number, or with one out of range, is no
    score and counted as one that does not come (`rollout/unscored_error`); `env.timeout` bounds all tries together.

    Args:
        url: of the API, as clients take it: `http://host:port/v1`; asked is its `/chat/completions`.
        model: its name there.
        prompt: the question, with `$solution`, `$ground_truth`, `$data_source`, `$best` and the names of `extra_info`
            replaced; `$$` is a dollar sign.
        system: a message that goes before it; empty: none.
        best: the number that full marks have.
        max_tokens, temperature: of the judge's answer.
        api_key_variable: the environment variable that holds a key; empty: none is sent.
        retries, backoff, timeout: see `remote_reward`.

    Raises:
        UserError: no http(s) URL, no such variable, an answer that is no completion or has no number from 0 to `best`.
        requests.RequestException: no answer after all tries.
    """
    values = {name: value for name, value in extra_info.items() if name.isidentifier()}
    values |= {"solution": solution_str, "ground_truth": ground_truth, "data_source": data_source, "best": f"{best:g}"}
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": Template(prompt).safe_substitute(values)})
    asked = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
    where = f"{url.rstrip('/')}/chat/completions"
    answer = post(
        where, asked, retries=retries, backoff=backoff, timeout=timeout, headers=_authorization(api_key_variable)
    )
    try:
        text = str(answer["choices"][0]["message"]["content"] or "")
    except (TypeError, KeyError, IndexError):
        raise UserError(f"answered {str(answer)[:80]!r}", where=where, expected="a chat completion") from None
    numbers = _NUMBER.findall(after_thinking(text))
    if not numbers or not 0 <= float(numbers[-1]) <= best:
        raise UserError(
            f"judged {text[-80:]!r}", where=where, expected=f"a number from 0 to {best:g} at the end of its answer"
        )
    return float(numbers[-1]) / best


def _authorization(variable: str) -> dict[str, str]:
    if not variable:
        return {}
    if variable not in os.environ:
        raise UserError(
            "is not set", where=f"environment variable {variable}", fix="set it, or leave api_key_variable out"
        )
    return {"Authorization": f"Bearer {os.environ[variable]}"}
