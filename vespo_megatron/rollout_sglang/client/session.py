"""Calls to servers from an event loop, over connections that stay open: the asynchronous twin of `control.call`."""

from __future__ import annotations

import http.client
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from vespo_megatron.rollout_sglang.client.control import request_headers
from vespo_megatron.rollout_sglang.client.failures import ReplyTooLarge, explained, value_of

if TYPE_CHECKING:
    import aiohttp

_CONNECT_S = 10.0


@asynccontextmanager
async def open_session() -> AsyncIterator[aiohttp.ClientSession]:
    """As many connections as there are calls. Nothing is unpacked on the way: what a reply takes is what was sent."""
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0, force_close=False)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        yield session


async def call_in(
    session: aiohttp.ClientSession,
    url: str,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    timeout_s: float,
    max_bytes: int,
    api_key: str | None = None,
    late: str = "see the server's log",
) -> Any:
    """See `control.call`, in arguments, what is returned and what is raised.

    Args:
        session: of `open_session`.
        max_bytes: of the reply's body.
        late: what to do where `timeout_s` passes.
    """
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, _CONNECT_S))
    headers = request_headers(api_key)
    with explained(url, path, timeout_s, late=late):
        try:
            async with session.request(
                "GET" if body is None else "POST",
                url + path,
                json=body,
                timeout=timeout,
                headers=headers,
                allow_redirects=False,
            ) as response:
                raw = await _whole(response, max_bytes)
        except aiohttp.ConnectionTimeoutError as error:
            raise ConnectionError(f"no connection within {timeout.sock_connect:g} s") from error
        except TimeoutError:  # aiohttp's own are connection errors as well
            raise
        except aiohttp.ClientConnectionError as error:
            raise ConnectionError(str(error) or type(error).__name__) from error
        except aiohttp.ClientPayloadError as error:
            raise http.client.IncompleteRead(b"") from error
        kind, encoding = (response.headers.get(name, "") for name in ("Content-Type", "Content-Encoding"))
        return value_of(url, path, response.status, kind, encoding, raw)


async def _whole(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    if (response.content_length or 0) > max_bytes:
        raise ReplyTooLarge(max_bytes)
    raw = bytearray()
    async for piece in response.content.iter_any():
        raw += piece
        if len(raw) > max_bytes:
            raise ReplyTooLarge(max_bytes)
    return bytes(raw)
