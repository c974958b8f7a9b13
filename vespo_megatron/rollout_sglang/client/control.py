"""Blocking HTTP to a server's control endpoints: standard library only, one connection, deadline and limit per call."""

from __future__ import annotations

import http.client
import io
import json
import socket
import ssl
import time
from typing import Any
from urllib.parse import SplitResult, urlsplit

from vespo_megatron.rollout_sglang.client.failures import ReplyTooLarge, explained, value_of

MAX_REPLY_BYTES = 1 << 28
"""Of a control call: the manifest of a model of 100,000 tensors on 16 ranks is half of that."""
_PIECE = 1 << 16


def request_headers(api_key: str | None) -> dict[str, str]:
    """What every call carries: the key, where there is one; and that a reply is wanted as it is, not compressed."""
    return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})


def call(
    url: str,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    timeout_s: float,
    api_key: str | None = None,
    max_bytes: int = MAX_REPLY_BYTES,
) -> Any:
    """POST `body` (GET when it is None) and return the decoded JSON reply, None for an empty one.

    A reply that is not JSON, and does not say that it is, is returned as text. Redirects are not followed, an answer
    from elsewhere is not the server's; no proxy of the environment is used, servers are in this cluster.

    Args:
        timeout_s: for the whole call, from connecting to the reply's last byte.
        max_bytes: of the reply, headers included.

    Raises:
        HttpRefused: any status but 2xx, or a `success: false`.
        ServerGone: the server cannot be reached, or broke off.
        ServerFault: no whole reply within `timeout_s`, too large a one, or one that is none.
    """
    deadline = time.monotonic() + timeout_s
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Connection": "close", **request_headers(api_key)}
    parts = urlsplit(url)
    with explained(url, path, timeout_s):
        wire = _Wire(_connect(parts, timeout_s), deadline, max_bytes)
        try:
            connection = http.client.HTTPConnection(parts.netloc)
            connection.sock = wire  # all that `http.client` asks of a socket
            connection.request("GET" if data is None else "POST", parts.path + path, body=data, headers=headers)
            response = connection.getresponse()
            kind, encoding = response.getheader("Content-Type", ""), response.getheader("Content-Encoding", "")
            return value_of(url, path, response.status, kind, encoding, _whole(response, max_bytes))
        finally:
            wire.disconnect()


def _connect(url: SplitResult, timeout_s: float) -> socket.socket:
    secure = url.scheme == "https"
    host = url.hostname or ""
    plain = socket.create_connection((host, url.port or (443 if secure else 80)), timeout_s)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not secure:
        return plain
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _whole(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if response.length is None and not response.chunked:  # its headers were cut: servers always say one or the other
        raise http.client.HTTPException("does not say where it ends")
    if (response.length or 0) > max_bytes:  # nothing is set aside for what is only claimed
        raise ReplyTooLarge(max_bytes)
    raw = bytearray()
    while piece := response.read1(_PIECE):
        raw += piece
    if response.length:
        raise http.client.IncompleteRead(bytes(raw[:100]), response.length)
    return bytes(raw)


class _Wire:
    """A connected socket as `http.client` uses one, under one deadline and one limit for all that it brings."""

    def __init__(self, connected: socket.socket, deadline: float, max_bytes: int) -> None:
        self._socket, self._deadline = connected, deadline
        self._max_bytes = self._left = max_bytes

    def sendall(self, data: bytes) -> None:
        """Within the deadline."""
        self._until_deadline()
        self._socket.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What a reply is read from."""
        return io.BufferedReader(_Bytes(self))

    def receive(self, buffer: Any) -> int:
        """Bytes that came into `buffer`; 0 at the end. Raises `TimeoutError`, `ReplyTooLarge`."""
        self._until_deadline()
        count = self._socket.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise ReplyTooLarge(self._max_bytes)
        return count

    def close(self) -> None:
        """Nothing: `http.client` has done with the connection once it has the headers, the reply is still to come."""

    def disconnect(self) -> None:
        """End the connection."""
        self._socket.close()

    def _until_deadline(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)


class _Bytes(io.RawIOBase):
    """A wire to read from."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `_Wire.receive`."""
        return self._wire.receive(buffer)
