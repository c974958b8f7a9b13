"""An asyncio client of one SGLang server: generation with deadlines and careful retries, and the control endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from vespo_megatron.errors import UserError
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.rollout_sglang.client.check import Check
from vespo_megatron.rollout_sglang.client.control import call
from vespo_megatron.rollout_sglang.client.failures import explained
from vespo_megatron.rollout_sglang.client.reply import parse_reply
from vespo_megatron.rollout_sglang.client.request import build_body, max_reply_bytes
from vespo_megatron.rollout_sglang.client.scoring import parse_scores, scoring_body
from vespo_megatron.rollout_sglang.client.server_info import ServerInfo
from vespo_megatron.rollout_sglang.client.session import call_in
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult
from vespo_megatron.rollout_sglang.faults import HttpRefused, ServerFault, ServerGone

if TYPE_CHECKING:
    import aiohttp
    import numpy as np

_ABORT_TIMEOUT_S = 5.0
_RETRY_DELAYS_S = (0.2, 1.0, 3.0)
_BUSY = (429, 503)
UNKNOWN_VERSION = "unknown"
"""Of a server that was left with a part of new weights."""
T = TypeVar("T")
_HEALTH_BYTES = 1 << 16


class SGLangClient:
    """One server. Control calls block; `generate` is asynchronous and holds no connection between calls.

    Args:
        url: for instance "http://127.0.0.1:31000".
        shape: of the served model.
        context_length: prompt and response tokens at most.
        return_routes: ask for the experts of every token.
        request_timeout_s: deadline of one generation call.
        keep_bad_numbers: pass log-probs that are not finite on instead of raising; see `parse_reply`.
        api_key: sent as a bearer token; never part of a message.
    """

    control_timeout_s = 30.0
    """Deadline of a control call that is given none."""

    def __init__(
        self,
        url: str,
        shape: ModelShape,
        *,
        context_length: int,
        return_routes: bool,
        request_timeout_s: float,
        keep_bad_numbers: bool = False,
        api_key: str | None = None,
    ) -> None:
        self.url, self.shape = url.rstrip("/"), shape
        self.context_length, self.return_routes = context_length, return_routes
        self.request_timeout_s = request_timeout_s
        self.keep_bad_numbers = keep_bad_numbers
        self.retries = 0
        self._api_key = api_key

    async def generate(
        self, session: aiohttp.ClientSession, requests: Sequence[GenerationRequest]
    ) -> list[GenerationResult]:
        """Several requests in one call, answered together. They must have passed `request.check_request`.

        Repeated are only calls that the server did not take on (connection refused or lost before a reply, 429, 503):
        a response that was drawn and lost was never seen, so drawing again biases nothing.

        Raises:
            ServerGone: it cannot be reached, after repetitions.
            ServerFault: an answer that is wrong, or none within `request_timeout_s` (it is then aborted there).
        """
        for delay in (*_RETRY_DELAYS_S, None):
            body = build_body(requests, self.shape, self.context_length, self.return_routes)
            try:
                replies = await self._with_deadlines(requests, body, self._post(session, body))
                break
            except ServerFault as fault:
                if delay is None or not _may_be_repeated(fault):
                    if not isinstance(fault, ServerGone | HttpRefused):
                        await self.abort(body["rid"])  # it may be at it still
                    raise
                self.retries += 1
                await asyncio.sleep(delay)
        if not isinstance(replies, list) or len(replies) != len(requests):
            count = len(replies) if isinstance(replies, list) else type(replies).__name__
            where, expected = f"server {self.url} /generate", f"a list of {len(requests)} responses"
            raise ServerFault(f"answered {count}", url=self.url, where=where, expected=expected)
        with explained(self.url, "/generate", self.request_timeout_s):
            return [
                parse_reply(
                    reply,
                    request,
                    self.shape,
                    sent_as=sent_as,
                    server=self.url,
                    return_routes=self.return_routes,
                    context_length=self.context_length,
                    keep_bad_numbers=self.keep_bad_numbers,
                    sent_routes_start=body["routed_experts_start_len"],
                )
                for reply, request, sent_as in zip(replies, requests, body["rid"], strict=True)
            ]

    async def _with_deadlines(
        self, requests: Sequence[GenerationRequest], body: dict[str, Any], post: Awaitable[Any]
    ) -> Any:
        """The answer to `post`; requests that run past their own deadline are aborted, and come back as they are."""
        loop, aborts = asyncio.get_running_loop(), set()

        def abort(request_id: str) -> None:
            aborts.add(asyncio.ensure_future(self.abort([request_id])))

        timers = [
            loop.call_later(request.deadline_s, abort, request_id)
            for request, request_id in zip(requests, body["rid"], strict=True)
            if request.deadline_s is not None
        ]
        try:
            return await post
        finally:
            for timer in timers:
                timer.cancel()
            await asyncio.gather(*aborts)

    async def _post(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> Any:
        return await call_in(
            session,
            self.url,
            "/generate",
            body,
            timeout_s=self.request_timeout_s,
            max_bytes=max_reply_bytes(body, self.shape),
            api_key=self._api_key,
            late="raise policy.generation.sglang_cfg.request_timeout, or see the server's log",
        )

    async def is_healthy(self, session: aiohttp.ClientSession, *, timeout_s: float) -> bool:
        """`/health`: whether the scheduler has answered anything just now."""
        try:
            await call_in(
                session,
                self.url,
                "/health",
                timeout_s=timeout_s,
                max_bytes=_HEALTH_BYTES,
                api_key=self._api_key,
            )
        except ServerFault:
            return False
        return True

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """Stop requests by the ids they were sent with, or all of them; a server that is gone has aborted them."""
        bodies = [{"abort_all": True}] if request_ids is None else [{"rid": rid} for rid in request_ids]
        for body in bodies:
            try:
                await asyncio.to_thread(self.call, "/abort_request", body, timeout_s=_ABORT_TIMEOUT_S)
            except UserError:
                return

    def call(self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        """A control endpoint, blocking: see `control.call`."""
        return call(self.url, path, body, timeout_s=timeout_s or self.control_timeout_s, api_key=self._api_key)

    def ask(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        read: Callable[[Check, Any], T],
        timeout_s: float | None = None,
    ) -> T:
        """As `call`, and what `read` makes of the reply.

        Args:
            read: is given a `Check` and the reply; whatever it raises is the server's fault.
        """
        reply = self.call(path, body, timeout_s=timeout_s)
        with explained(self.url, path, timeout_s or self.control_timeout_s):
            return read(Check(f"server {self.url} {path}"), reply)

    def score(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> np.ndarray:
        """float32 [R], log-probs at temperature 1 of a response drawn before, in one pass; NaN: it does not tell."""
        body = scoring_body(prompt_ids, response_ids)
        return self.ask(
            "/generate",
            body,
            read=lambda check, reply: parse_scores(check, reply, response_ids, self.shape.vocab_size),
            timeout_s=self.request_timeout_s,
        )

    def weight_version(self) -> str:
        """Of `/model_info`: a whole number, or what else the server was started or marked with."""

        def read(check: Check, reply: Any) -> str:
            value = check.dictionary(reply, "reply").get("weight_version")
            text = str(value) if value is None or type(value) is int else check.text(value, "weight_version")
            return str(check.whole_number(text, "weight_version")) if text.isdigit() else text

        return self.ask("/model_info", read=read)

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """`/server_info`: SGLang's version, device, …; its scheduler takes part in the answer."""
        return self.ask("/server_info", read=ServerInfo.read, timeout_s=timeout_s)

    def take_over(self) -> None:
        """Into a known state, whatever its last user left it in: it serves, runs nothing, and no update is open.

        Weights of which an update was open are marked `UNKNOWN_VERSION`.
        """
        self._unless_refused("/continue_generation", {})  # from wherever it is: SGLang pauses twice only by abort
        self._unless_refused("/pause_generation", {"mode": "abort"})
        if self._unless_refused("/end_weight_update", {}):
            self.call("/update_weight_version", {"new_version": UNKNOWN_VERSION, "abort_all_requests": False})
        self._unless_refused("/flush_cache?timeout=10", {})
        self._unless_refused("/continue_generation", {})

    def _unless_refused(self, path: str, body: dict[str, Any]) -> bool:
        """Whether the server did as it was told."""
        try:
            self.call(path, body)
        except HttpRefused:
            return False
        return True

    def pause(self) -> None:
        """End what runs (clients get what there is, finish reason 'abort') and hold back what comes."""
        self.call("/pause_generation", {"mode": "abort"})

    def pause_in_place(self) -> None:
        """Stop what runs where it is, to go on from there, and hold back what comes."""
        self.call("/pause_generation", {"mode": "in_place"})

    def resume(self) -> None:
        """Serve again."""
        self.call("/continue_generation", {})

    def flush_cache(self) -> None:
        """Drop the prefix cache; raises `HttpRefused` if requests still run after 10 s."""
        self.call("/flush_cache?timeout=10", {})

    def is_ready(self) -> bool:
        """Whether the server answers `/ready` with 200, within 5 s."""
        try:
            self.call("/ready", timeout_s=5.0)
        except UserError:
            return False
        return True


def _may_be_repeated(fault: ServerFault) -> bool:
    """Whether the server has not taken a call on, or nobody will ever see what it drew."""
    return isinstance(fault, ServerGone) or (isinstance(fault, HttpRefused) and fault.status in _BUSY)
