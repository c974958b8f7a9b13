"""A reward that another service computes: one POST per response, repeated when the service is busy or gone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from vespo_megatron.errors import UserError

RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)


def remote_reward(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any],
    *,
    url: str,
    retries: int = 5,
    backoff: float = 0.5,
    timeout: float = 30.0,
) -> float | dict[str, float]:
    """The service's answer: a number, or an object with `score`.

    It is sent `{"data_source", "solution_str", "ground_truth", "extra_info"}` as JSON and should answer the same for
    the same response: a request whose answer was lost is sent again. `env.timeout` bounds all tries together.

    Args:
        retries: further tries after a refused connection or a status of `RETRY_STATUS`.
        backoff: seconds before the second of them, doubled each time; a Retry-After header counts instead.
        timeout: seconds of one try.

    Raises:
        UserError: no http(s) URL, an answer that is neither.
        requests.RequestException: no answer after all tries.
    """
    asked = {
        "data_source": data_source,
        "solution_str": solution_str,
        "ground_truth": ground_truth,
        "extra_info": dict(extra_info),
    }
    value = post(url, asked, retries=retries, backoff=backoff, timeout=timeout)
    score = value.get("score") if isinstance(value, dict) else value
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise UserError(f"answered {str(value)[:80]!r}", where="remote reward", expected='a number or {"score": …}')
    return value if isinstance(value, dict) else float(value)


def post(
    url: str, content: Any, *, retries: int, backoff: float, timeout: float, headers: Mapping[str, str] | None = None
) -> Any:
    """What a service answers to JSON: JSON again, or else its text. Arguments and errors as of `remote_reward`."""
    answer = _session(url, retries, backoff).post(url, json=content, timeout=timeout, headers=headers)
    answer.raise_for_status()
    try:
        return answer.json()
    except json.JSONDecodeError:
        return answer.text


@cache
def _session(url: str, retries: int, backoff: float) -> Any:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"is {url!r}", where="env.reward_kwargs, url", expected="an http:// or https:// URL")
    policy = Retry(
        total=retries,
        backoff_factor=backoff,
        status_forcelist=RETRY_STATUS,
        allowed_methods={"POST"},
        respect_retry_after_header=True,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=policy))
    return session
