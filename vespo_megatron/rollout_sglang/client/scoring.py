"""A response that was drawn before, scored by SGLang as part of a prompt (contract of 0.5.23)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vespo_megatron.rollout_sglang.client.check import Check


def scoring_body(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> dict[str, Any]:
    """The body for `/generate`: nothing is drawn, and what the cache holds of the response is not used."""
    return {
        "input_ids": [*prompt_ids, *response_ids],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": len(prompt_ids) - 1,
        "stream": False,
    }


def parse_scores(check: Check, reply: Any, response_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """float32 [R], the response's log-probs; raises what `Check` raises for any other reply.

    Instead of the vocabulary's last token SGLang scores token 0 (`logprob_result_processor.py`, for placeholders of
    images): NaN.
    """
    meta = check.dictionary(check.dictionary(reply, "reply").get("meta_info"), "meta_info")
    entries = check.sequence(meta.get("input_token_logprobs"), "input_token_logprobs")
    check.equal(len(entries), len(response_ids) + 1, "the number of input_token_logprobs")
    scores = np.empty(len(response_ids), dtype=np.float32)
    for index, (entry, token) in enumerate(zip(entries[1:], response_ids, strict=True)):
        name = f"input_token_logprobs {index + 1}"
        check.that(len(check.sequence(entry, name)) >= 2, f"{name} is short", "a log-prob and a token")
        if token == vocab_size - 1:
            scores[index] = np.nan
            continue
        check.equal(entry[1], token, f"the token of {name}")
        check.that(isinstance(entry[0], float | int), f"{name} has no log-prob", "a number")
        scores[index] = entry[0]
    return scores
