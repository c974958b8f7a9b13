"""The checked request and its body for SGLang's `/generate` (contract of 0.5.23): pure functions."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.recipe.schema import MAX_SAMPLING_MASK_TOKENS
from vespo_megatron.rollout_sglang.engine import GenerationRequest

_TOKEN_BYTES, _ID_BYTES = 512, 16
"""Of JSON, at most: what comes with every token; an id, in a list."""


def check_request(request: GenerationRequest, shape: ModelShape, context_length: int) -> None:
    """Raise `UserError` for what would fail on the server, or kill it (a token id outside the vocabulary does)."""
    where, sampling = f"request {request.request_id}", request.sampling
    length = len(request.prompt_ids)
    if not 0 < length < context_length:
        raise UserError(
            f"{length} prompt tokens",
            where=where,
            expected=f"1 to {context_length - 1} of them",
            fix="shorten the prompt or raise policy.max_total_sequence_length",
        )
    for token in (min(request.prompt_ids), max(request.prompt_ids)):
        if not 0 <= token < shape.vocab_size:
            raise UserError(
                f"token id {token}",
                where=where,
                expected=f"0 to {shape.vocab_size - 1}",
                fix="use the tokenizer that belongs to the model",
            )
    checks = [
        (sampling.max_new_tokens >= 1, f"max_new_tokens {sampling.max_new_tokens}", "at least 1"),
        (sampling.temperature >= 0, f"temperature {sampling.temperature}", "at least 0"),
        (0 < sampling.top_p <= 1, f"top_p {sampling.top_p}", "above 0, at most 1"),
        (sampling.top_k == -1 or sampling.top_k >= 1, f"top_k {sampling.top_k}", "-1 for all, or at least 1"),
        (0 <= sampling.min_p < 1, f"min_p {sampling.min_p}", "at least 0, below 1"),
        (request.deadline_s is None or request.deadline_s > 0, f"deadline_s {request.deadline_s}", "more than 0"),
    ]
    for good, what, expected in checks:
        if not good:
            raise UserError(what, where=where, expected=expected)
    if request.wants_sampling_mask and not 1 <= _effective_top_k(request, shape) <= MAX_SAMPLING_MASK_TOKENS:
        raise UserError(
            f"top_p {sampling.top_p}, top_k {sampling.top_k}, min_p {sampling.min_p}: SGLang 0.5.23 then returns the "
            "log-probs of the full distribution, not of the truncated one it samples from, and μ would be wrong",
            where=where,
            expected=f"top_k from 1 to {MAX_SAMPLING_MASK_TOKENS} with any top_p and min_p, for which it reports both",
            fix="add a top_k, sample from the full distribution, or mark the request as evaluation",
        )


def _effective_top_k(request: GenerationRequest, shape: ModelShape) -> int:
    """A small vocabulary is a top-k of its own, which SGLang wants a number for."""
    top_k = request.sampling.top_k
    return shape.vocab_size if top_k == -1 and shape.vocab_size <= MAX_SAMPLING_MASK_TOKENS else top_k


def build_body(
    requests: Sequence[GenerationRequest], shape: ModelShape, context_length: int, return_routes: bool
) -> dict[str, Any]:
    """One body for several requests; request ids get a suffix, so that a repeated one never meets its first try.

    SGLang 0.5.23 takes one `routed_experts_start_len` for all of a body's requests.
    """
    truncated = [request.wants_sampling_mask for request in requests]
    return {
        "input_ids": [list(request.prompt_ids) for request in requests],
        "sampling_params": [_sampling_params(request, shape, context_length) for request in requests],
        "rid": [f"{request.request_id}#{uuid.uuid4().hex[:8]}" for request in requests],
        "return_logprob": True,
        "return_routed_experts": return_routes,
        "routed_experts_start_len": min(request.routes_start for request in requests) if return_routes else 0,
        "stream": False,
    } | ({"return_sampling_mask": truncated} if any(truncated) else {})


def _sampling_params(request: GenerationRequest, shape: ModelShape, context_length: int) -> dict[str, Any]:
    sampling = request.sampling
    return {
        "max_new_tokens": min(sampling.max_new_tokens, context_length - len(request.prompt_ids)),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": _effective_top_k(request, shape) if request.wants_sampling_mask else sampling.top_k,
        "min_p": sampling.min_p,
        "stop_token_ids": list(sampling.stop_token_ids) or None,
        # With stop ids SGLang also stops at the model's own end-of-sequence token; without any, at nothing.
        "ignore_eos": not sampling.stop_token_ids,
    }


def max_reply_bytes(body: dict[str, Any], shape: ModelShape) -> int:
    """More than the reply to a body of `build_body` can have.

    A token brings its id, log-probs and a version at most; its experts, base64 of int32 in all layers; and, where it is
    asked for, its sampling mask. The rest of a response is less than a mebibyte.
    """
    per_token = _TOKEN_BYTES
    if body["return_routed_experts"]:
        per_token += 6 * shape.num_hidden_layers * shape.num_experts_per_tok
    if any(body.get("return_sampling_mask", ())):
        per_token += _ID_BYTES * min(shape.vocab_size, MAX_SAMPLING_MASK_TOKENS)
    drawn = sum(sampling["max_new_tokens"] for sampling in body["sampling_params"])
    return (len(body["rid"]) << 20) + per_token * (drawn + sum(map(len, body["input_ids"])))
