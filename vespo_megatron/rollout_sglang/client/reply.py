"""The checked reply of SGLang's `/generate` (contract of 0.5.23): a pure function."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np

from vespo_megatron.data.sample import FINISH_REASONS, UNKNOWN_VERSION, smallest_int_dtype
from vespo_megatron.data.sampling_mask import SamplingMask
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.rollout_sglang.client.check import Check, short
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult

_LOG_PROB_SLACK = 1e-3
"""A log-prob above zero by rounding alone stays below this."""
_HUGE = 10**300
"""JSON's integers know no bound, but float64 does."""


def parse_reply(
    reply: Any,
    request: GenerationRequest,
    shape: ModelShape,
    *,
    sent_as: str,
    server: str,
    return_routes: bool,
    context_length: int,
    keep_bad_numbers: bool = False,
    sent_routes_start: int = 0,
) -> GenerationResult:
    """One element of a `/generate` reply as a `GenerationResult`.

    `sent_as` is the id that the request was sent with: an answer to another one is none, however well it fits.
    Every length, id, shape and range is checked; raises `UserError` naming request and server for whatever differs.
    `keep_bad_numbers` lets log-probs that are not finite through, for a caller that drops such samples and counts them.
    `sent_routes_start` is the call's, of all its requests; rows before the request's own are cut off.

    SGLang 0.5.23 ends a retracted request that waits (out of memory, then a pause) with what it has told so far, and
    no routes: such a reply counts as an abort before the first token.
    """
    check = Check(f"reply of server {server} to request {request.request_id}")
    meta = check.dictionary(check.dictionary(reply, "reply").get("meta_info"), "meta_info")
    check.equal(meta.get("id"), sent_as, "id")
    prompt_length = len(request.prompt_ids)
    output_ids = _token_ids(reply.get("output_ids"), shape.vocab_size, check)
    length = len(output_ids)
    check.equal(meta.get("completion_tokens", length), length, "completion_tokens")
    check.equal(meta.get("prompt_tokens", prompt_length), prompt_length, "prompt_tokens")
    limit = min(request.sampling.max_new_tokens, context_length - prompt_length)
    check.that(length <= limit, f"{length} tokens", f"at most {limit}")
    finish_reason = _finish_reason(meta.get("finish_reason"), check)
    check.that(length > 0 or finish_reason == "abort", "no token", "at least one, unless aborted")
    log_probs = _log_probs(meta.get("output_token_logprobs"), output_ids, check, keep_bad_numbers)
    sampling_mask = None
    if request.wants_sampling_mask:
        sampling_mask = _sampling_mask(meta.get("output_token_sampling_mask"), output_ids, shape, check)
        log_probs = _truncated_log_probs(meta.get("output_token_sampling_logprobs"), log_probs, check, keep_bad_numbers)
    versions = _weight_versions(meta, length, check)
    extra = {"cached_tokens": float(check.whole_number(meta.get("cached_tokens") or 0, "cached_tokens"))}
    retractions = check.whole_number(meta.get("num_retractions") or 0, "num_retractions")
    if retractions:
        extra["retractions"] = float(retractions)
    if return_routes and length > 0 and finish_reason == "abort" and meta.get("routed_experts") is None:
        nothing = None if sampling_mask is None else SamplingMask.whole(0)
        return GenerationResult(
            request.request_id,
            output_ids[:0],
            log_probs[:0],
            versions[:0],
            finish_reason,
            sampling_mask=nothing,
            extra=extra,
        )
    routes, route_versions = None, None
    if return_routes and length > 0:
        rows = prompt_length + length - 1
        routes = _routes(meta.get("routed_experts"), rows - sent_routes_start, shape, check)
        routes = routes[request.routes_start - sent_routes_start :]
        route_versions = _route_versions(versions, prompt_length, retracted=retractions > 0)
        route_versions = route_versions[request.routes_start :]
    return GenerationResult(
        request_id=request.request_id,
        output_ids=output_ids,
        behavior_log_probs=log_probs,
        weight_versions=versions,
        finish_reason=finish_reason,
        routes=routes,
        route_versions=route_versions,
        sampling_mask=sampling_mask,
        extra=extra,
    )


def _token_ids(value: Any, vocab_size: int, check: Check) -> np.ndarray:
    good = isinstance(value, list) and all(type(token) is int for token in value)
    check.that(good, "output_ids is not a list of integers", "a list of token ids")
    inside = not value or (min(value) >= 0 and max(value) < vocab_size)
    check.that(inside, "a token id outside the vocabulary", f"0 to {vocab_size - 1}")
    return np.array(value, dtype=np.int64)


def _finish_reason(value: Any, check: Check) -> str:
    reason = value.get("type") if isinstance(value, dict) else value
    check.that(reason in FINISH_REASONS, f"finish_reason {short(value)}", f"one of {FINISH_REASONS}")
    return str(reason)


def _log_probs(value: Any, output_ids: np.ndarray, check: Check, keep_bad_numbers: bool) -> np.ndarray:
    """float32 [R] out of `[[log_prob, token id, text], …]`."""
    rows = value if isinstance(value, list) else []
    check.that(len(rows) == len(output_ids), f"{len(rows)} log-probs", f"{len(output_ids)}, one per output token")
    good = all(
        isinstance(row, (list, tuple)) and len(row) >= 2 and type(row[0]) in (int, float) and row[1] == token
        for row, token in zip(rows, output_ids.tolist(), strict=True)
    )
    check.that(good, "log-probs that do not belong to the output tokens", "[log_prob, token id] per output token")
    log_probs = _float32([row[0] for row in rows])
    sane = np.isfinite(log_probs) & (log_probs <= _LOG_PROB_SLACK)
    check.that(keep_bad_numbers or bool(sane.all()), f"log-prob {log_probs[~sane][:1]}", "finite and at most 0")
    return log_probs


def _float32(numbers: Sequence[int | float]) -> np.ndarray:
    """Numbers of any size; beyond float32 they are infinite."""
    with np.errstate(over="ignore"):
        return np.array([max(min(each, _HUGE), -_HUGE) for each in numbers], dtype=np.float64).astype(np.float32)


def _truncated_log_probs(value: Any, full: np.ndarray, check: Check, keep_bad_numbers: bool) -> np.ndarray:
    """float32 [R] of the truncated distribution, in which no token is less likely than in the full one."""
    rows = value if isinstance(value, list) else []
    good = len(rows) == len(full) and all(type(row) in (int, float) for row in rows)
    check.that(good, f"{len(rows)} truncated log-probs", f"{len(full)}, one per output token")
    log_probs = _float32(rows)
    sane = np.isfinite(log_probs) & (log_probs <= _LOG_PROB_SLACK) & (log_probs >= full - _LOG_PROB_SLACK)
    check.that(
        keep_bad_numbers or bool(sane.all()), f"truncated log-prob {log_probs[~sane][:1]}", "from the full one to 0"
    )
    return log_probs


def _sampling_mask(value: Any, output_ids: np.ndarray, shape: ModelShape, check: Check) -> SamplingMask:
    """Out of a list of token ids per output token, which holds the token itself."""
    rows = value if isinstance(value, list) else []
    expected = f"{len(output_ids)}, one per output token"
    check.that(len(rows) == len(output_ids), f"sampling masks of {len(rows)} tokens", expected)
    good = all(isinstance(row, list) and all(type(token) is int for token in row) for row in rows)
    good = good and all(min(row, default=-1) >= 0 and max(row) < shape.vocab_size for row in rows)
    check.that(good, "a sampling mask that is no list of token ids", f"ids from 0 to {shape.vocab_size - 1}")
    sampling_mask = SamplingMask.of(rows)
    inside = bool(sampling_mask.contains(output_ids).all())
    check.that(inside, "a token outside its sampling mask", "every token in its own")
    return sampling_mask


def _weight_versions(meta: dict[str, Any], length: int, check: Check) -> np.ndarray:
    """int64 [R] out of spans that must cover the response exactly."""
    spans = meta.get("weight_versions") or [{"version": meta.get("weight_version"), "start": 0, "end": length}]
    check.sequence(spans, "weight_versions")
    most = 2 * (length + 1)  # empty ones between them
    check.that(len(spans) <= most, f"{len(spans)} weight version spans", f"at most {most} for {length} tokens")
    expected = f"spans that cover {length} tokens"
    versions = np.empty(length, dtype=np.int64)
    position = 0
    for span in spans:
        fields = check.dictionary(span, "weight version span")
        start, end, version = (check.whole_number(fields.get(name), name) for name in ("start", "end", "version"))
        if not start == position <= end <= length:
            check.that(False, f"weight version spans {short(spans)}", expected)
        versions[start:end] = version
        position = end
    check.that(position == length, f"weight version spans {short(spans)}", expected)
    return versions


def _route_versions(versions: np.ndarray, prompt_length: int, *, retracted: bool) -> np.ndarray:
    """int64 [P + R - 1]: a row is of the weights that drew the token after it, the prompt's of those of the first.

    SGLang 0.5.23 runs what a retracted request had drawn again, and overwrites its routes, under the weights there are
    then. It does not say which those were: with several versions only the last one's rows are known to be true.
    """
    rows = np.concatenate([np.full(prompt_length - 1, versions[0]), versions])
    return np.where(rows == versions[-1], rows, UNKNOWN_VERSION) if retracted else rows


def _routes(value: Any, rows: int, shape: ModelShape, check: Check) -> np.ndarray:
    """Smallest unsigned integer [rows, sparse layers, topk] out of base64 int32 [rows, all layers, topk]."""
    check.that(isinstance(value, str), "no routed_experts", "routes: start it with --enable-return-routed-experts")
    try:
        flat = np.frombuffer(base64.b64decode(value, validate=True), dtype="<i4")
    except (binascii.Error, ValueError):
        check.that(False, "routed_experts that are not base64 of int32", "base64 of int32")
        raise
    expected = (rows, shape.num_hidden_layers, shape.num_experts_per_tok)
    check.that(flat.size == np.prod(expected), f"routes of {flat.size} numbers", f"{expected}")
    routes = flat.reshape(expected)[:, list(shape.moe_layers)]
    check.that(
        routes.size == 0 or (routes.min() >= 0 and routes.max() < shape.num_experts),
        "an expert that is not there",
        f"0 to {shape.num_experts - 1}",
    )
    ordered = np.sort(routes, axis=-1)
    check.that(not bool((ordered[..., 1:] == ordered[..., :-1]).any()), "one expert twice for a token", "distinct ones")
    return routes.astype(smallest_int_dtype(shape.num_experts))
