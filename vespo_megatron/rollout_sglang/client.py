"""An asyncio client of one SGLang server: generation with deadlines and careful retries, and the control endpoints."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult
from vespo_megatron.rollout_sglang.http_control import call, message_of
from vespo_megatron.rollout_sglang.model_shape import ModelShape
from vespo_megatron.rollout_sglang.reply import build_body, parse_reply

if TYPE_CHECKING:
    import aiohttp

_CONTROL_TIMEOUT_S = 30.0
_RETRY_DELAYS_S = (0.2, 1.0, 3.0)
_BUSY = (429, 503)


class SGLangClient:
    """One server. Control calls block; `generate` is asynchronous and holds no connection between calls.

    Args:
        url: for instance "http://127.0.0.1:31000".
        shape: of the served model.
        context_length: prompt and response tokens at most.
        return_routes: ask for the experts of every token.
        request_timeout_s: deadline of one generation call.
        keep_bad_numbers: pass log-probs that are not finite on instead of raising; see `parse_reply`.
    """

    def __init__(
        self,
        url: str,
        shape: ModelShape,
        *,
        context_length: int,
        return_routes: bool,
        request_timeout_s: float,
        keep_bad_numbers: bool = False,
    ) -> None:
        self.url, self.shape = url.rstrip("/"), shape
        self.context_length, self.return_routes = context_length, return_routes
        self.request_timeout_s = request_timeout_s
        self.keep_bad_numbers = keep_bad_numbers
        self.retries = 0

    async def generate(
        self, session: aiohttp.ClientSession, requests: Sequence[GenerationRequest]
    ) -> list[GenerationResult]:
        """Several requests in one call, answered together. They must have passed `reply.check_request`.

        Repeated are only calls that the server did not take on (connection refused or lost before a reply, 429, 503):
        a response that was drawn and lost was never seen, so drawing again biases nothing. An answer that is wrong,
        and a deadline that passed, are errors; what ran past it is aborted on the server.
        """
        body = build_body(requests, self.context_length, self.return_routes)
        where = f"server {self.url} /generate"
        for delay in (*_RETRY_DELAYS_S, None):
            try:
                replies = await self._post(session, body, where)
                break
            except _Repeatable as error:
                if delay is None:
                    raise UserError(
                        f"{error}, {len(_RETRY_DELAYS_S) + 1} times", where=where, fix="see the server's log"
                    ) from error
                self.retries += 1
                await asyncio.sleep(delay)
                body = build_body(requests, self.context_length, self.return_routes)
        if not isinstance(replies, list) or len(replies) != len(requests):
            count = len(replies) if isinstance(replies, list) else type(replies).__name__
            raise UserError(f"answered {count}", where=where, expected=f"a list of {len(requests)} responses")
        return [
            parse_reply(
                reply,
                request,
                self.shape,
                server=self.url,
                return_routes=self.return_routes,
                context_length=self.context_length,
                keep_bad_numbers=self.keep_bad_numbers,
            )
            for reply, request in zip(replies, requests, strict=True)
        ]

    async def _post(self, session: aiohttp.ClientSession, body: dict[str, Any], where: str) -> Any:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=self.request_timeout_s, sock_connect=10)
        try:
            async with session.post(f"{self.url}/generate", json=body, timeout=timeout) as response:
                raw = await response.read()
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectionError) as error:
            raise _Repeatable(f"cannot be reached ({error or type(error).__name__})") from error
        except TimeoutError as error:
            await self.abort(body["rid"])
            raise UserError(
                f"did not answer {len(body['rid'])} requests within {self.request_timeout_s:g} s",
                where=where,
                fix="raise policy.generation.sglang_cfg.request_timeout, or see the server's log",
            ) from error
        except aiohttp.ClientPayloadError as error:
            raise _Repeatable(f"broke off its reply ({error})") from error
        if response.status in _BUSY:
            raise _Repeatable(f"answered {response.status}")
        if response.status != 200:
            raise UserError(f"answered {response.status}: {message_of(raw)}", where=where)
        try:
            return json.loads(raw)
        except ValueError as error:
            raise UserError(f"a reply that is not JSON: {raw[:100]!r}", where=where) from error

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """Stop requests by the ids they were sent with, or all of them; a server that is gone has aborted them."""
        bodies = [{"abort_all": True}] if request_ids is None else [{"rid": rid} for rid in request_ids]
        for body in bodies:
            try:
                await asyncio.to_thread(self.call, "/abort_request", body)
            except UserError:
                return

    def call(self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = _CONTROL_TIMEOUT_S) -> Any:
        """A control endpoint, blocking: see `http_control.call`."""
        return call(self.url, path, body, timeout_s=timeout_s)

    def model_info(self) -> dict[str, Any]:
        """`/model_info`: model path, weight version, …"""
        return self.call("/model_info")

    def server_info(self) -> dict[str, Any]:
        """`/server_info`: SGLang's version, device, tensor parallel size, …"""
        return self.call("/server_info")

    def pause(self) -> None:
        """End what runs (clients get what there is, finish reason 'abort') and hold back what comes."""
        self.call("/pause_generation", {"mode": "abort"})

    def resume(self) -> None:
        """Serve again."""
        self.call("/continue_generation", {})

    def flush_cache(self) -> None:
        """Drop the prefix cache; `UserError` if requests still run after 10 s."""
        self.call("/flush_cache?timeout=10", {})

    def is_ready(self) -> bool:
        """Whether the server answers `/ready` with 200, within 5 s."""
        try:
            self.call("/ready", timeout_s=5.0)
        except UserError:
            return False
        return True


class _Repeatable(Exception):
    """The server did not take the call on."""
