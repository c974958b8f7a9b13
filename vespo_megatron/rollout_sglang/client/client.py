"""An asyncio client of one SGLang server: generation with deadlines and careful retries, and the control endpoints."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_shape import ModelShape
from vespo_megatron.rollout_sglang.client.control import bearer, call, message_of
from vespo_megatron.rollout_sglang.client.reply import parse_reply
from vespo_megatron.rollout_sglang.client.request import build_body
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult
from vespo_megatron.rollout_sglang.faults import HttpRefused, ServerFault, ServerGone

if TYPE_CHECKING:
    import aiohttp

_CONTROL_TIMEOUT_S = 30.0
_ABORT_TIMEOUT_S = 5.0
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
        api_key: sent as a bearer token; never part of a message.
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
        where = f"server {self.url} /generate"
        for delay in (*_RETRY_DELAYS_S, None):
            body = build_body(requests, self.shape, self.context_length, self.return_routes)
            try:
                replies = await self._with_deadlines(requests, body, self._post(session, body, where))
                break
            except _Repeatable as error:
                if delay is None:
                    what = f"{error}, {len(_RETRY_DELAYS_S) + 1} times"
                    raise error.kind(what, url=self.url, where=where, fix="see the server's log") from error
                self.retries += 1
                await asyncio.sleep(delay)
        if not isinstance(replies, list) or len(replies) != len(requests):
            count = len(replies) if isinstance(replies, list) else type(replies).__name__
            expected = f"a list of {len(requests)} responses"
            raise ServerFault(f"answered {count}", url=self.url, where=where, expected=expected)
        try:
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
        except UserError as error:
            raise ServerFault.of(error, self.url) from error

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

    async def _post(self, session: aiohttp.ClientSession, body: dict[str, Any], where: str) -> Any:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=self.request_timeout_s, sock_connect=10)
        headers = bearer(self._api_key)
        try:
            async with session.post(
                f"{self.url}/generate", json=body, timeout=timeout, headers=headers, allow_redirects=False
            ) as response:
                raw = await response.read()
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectionError) as error:
            raise _Repeatable(f"cannot be reached ({error or type(error).__name__})", ServerGone) from error
        except TimeoutError as error:
            await self.abort(body["rid"])
            raise ServerFault(
                f"did not answer {len(body['rid'])} requests within {self.request_timeout_s:g} s",
                url=self.url,
                where=where,
                fix="raise policy.generation.sglang_cfg.request_timeout, or see the server's log",
            ) from error
        except aiohttp.ClientPayloadError as error:
            raise _Repeatable(f"broke off its reply ({error})", ServerGone) from error
        if response.status in _BUSY:
            raise _Repeatable(f"answered {response.status}", ServerFault)
        if response.status != 200:
            raise HttpRefused(url=self.url, path="/generate", status=response.status, message=message_of(raw))
        try:
            return json.loads(raw)
        except ValueError as error:
            raise ServerFault(f"a reply that is not JSON: {raw[:100]!r}", url=self.url, where=where) from error

    async def is_healthy(self, session: aiohttp.ClientSession, *, timeout_s: float) -> bool:
        """`/health`: whether the scheduler has answered anything just now."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with session.get(f"{self.url}/health", timeout=timeout, headers=bearer(self._api_key)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """Stop requests by the ids they were sent with, or all of them; a server that is gone has aborted them."""
        bodies = [{"abort_all": True}] if request_ids is None else [{"rid": rid} for rid in request_ids]
        for body in bodies:
            try:
                await asyncio.to_thread(self.call, "/abort_request", body, timeout_s=_ABORT_TIMEOUT_S)
            except UserError:
                return

    def call(self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = _CONTROL_TIMEOUT_S) -> Any:
        """A control endpoint, blocking: see `control.call`."""
        return call(self.url, path, body, timeout_s=timeout_s, api_key=self._api_key)

    def model_info(self) -> dict[str, Any]:
        """`/model_info`: model path, weight version, …"""
        return self.call("/model_info")

    def server_info(self) -> dict[str, Any]:
        """`/server_info`: SGLang's version, device, tensor parallel size, …"""
        return self.call("/server_info")

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


class _Repeatable(Exception):
    """The server did not take the call on; `kind` is the fault it is in the end."""

    def __init__(self, what: str, kind: type[ServerFault]) -> None:
        super().__init__(what)
        self.kind = kind
