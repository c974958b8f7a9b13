"""Blocking HTTP to a server's control endpoints: standard library only, always with a deadline."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from vespo_megatron.rollout_sglang.faults import HttpRefused, ServerFault, ServerGone


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An answer from elsewhere is not the server's, and would be sent its key."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
"""No proxy of the environment: servers are on this machine or in this cluster."""


def bearer(api_key: str | None) -> dict[str, str]:
    """The header that carries the key, where there is one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def call(
    url: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float, api_key: str | None = None
) -> Any:
    """POST `body` (GET when it is None) and return the decoded JSON reply, None for an empty one.

    A reply that is not JSON is returned as text.

    Raises:
        HttpRefused: any status but 2xx, or a `success: false`.
        ServerGone: the server cannot be reached.
        ServerFault: no answer within `timeout_s`.
    """
    where = f"server {url} {path}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url + path, data=data, headers={"Content-Type": "application/json", **bearer(api_key)}
    )
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            text = response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        fix = "set policy.generation.sglang_cfg.api_key to the server's" if error.code in (401, 403) else ""
        raise HttpRefused(url=url, path=path, status=error.code, message=message_of(error.read()), fix=fix) from error
    except OSError as error:  # urllib wraps the reason of most
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        log = "see the server's log"
        if isinstance(reason, TimeoutError):
            raise ServerFault(f"did not answer within {timeout_s:g} s", url=url, where=where, fix=log) from error
        raise ServerGone(f"cannot be reached ({reason})", url=url, where=where, fix=log) from error
    try:
        reply = json.loads(text) if text.strip() else None
    except ValueError:
        return text
    if isinstance(reply, dict) and reply.get("success") is False:
        raise HttpRefused(url=url, path=path, status=200, message=str(reply.get("message", reply)))
    return reply


def message_of(raw: bytes) -> str:
    """The human part of an error reply, at most 500 characters."""
    text = raw.decode(errors="replace")
    try:
        reply = json.loads(text)
        while isinstance(reply, dict):
            reply = reply.get("message") or reply.get("error") or reply.get("detail") or text
        text = str(reply)
    except ValueError:
        pass
    return text.strip()[:500]
