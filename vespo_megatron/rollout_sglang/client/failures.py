"""Every failure of a call to a server as one of `faults`: the one place where a reply that is none becomes an error.

A server, or what stands in front of it, can send anything: half a reply, another protocol, headers without end, a
megabyte that unpacks to gigabytes, JSON nested a million deep, a list where an object belongs. Whatever that raises on
the way from the socket to the value that the caller wants, in any library, the caller meets a `ServerFault`.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.faults import HttpRefused, ServerFault, ServerGone

_LOG = "see the server's log"


class ReplyTooLarge(Exception):
    """A reply has more bytes than one to this call can have."""


@contextmanager
def explained(url: str, path: str, timeout_s: float, *, late: str = _LOG) -> Iterator[None]:
    """A call to `url` + `path`, from connecting to reading its reply: what goes wrong within is raised as a fault.

    Args:
        timeout_s: the call's deadline.
        late: what to do where it passes.

    Raises:
        ServerGone: it cannot be reached, or broke off.
        ServerFault: no whole reply within the deadline; or one that is none, or not of the kind that was expected.
    """
    where = f"server {url} {path}"
    try:
        yield
    except ServerFault:
        raise
    except UserError as error:
        raise ServerFault.of(error, url) from error
    except TimeoutError as error:
        raise ServerFault(f"did not answer within {timeout_s:g} s", url=url, where=where, fix=late) from error
    except ReplyTooLarge as error:
        raise ServerFault(f"sent a reply of more than {error} bytes", url=url, where=where, fix=_LOG) from error
    except http.client.IncompleteRead as error:
        raise ServerGone("broke off its reply", url=url, where=where, fix=_LOG) from error
    except OSError as error:
        raise ServerGone(f"cannot be reached ({error})", url=url, where=where, fix=_LOG) from error
    except Exception as error:
        told = f"{type(error).__name__}: {error}"[:200]
        raise ServerFault(f"sent what is no reply ({told})", url=url, where=where, fix=_LOG) from error


def value_of(url: str, path: str, status: int, content_type: str, content_encoding: str, raw: bytes) -> Any:
    """The decoded JSON of a reply, None for an empty one; text that does not claim to be JSON, as text.

    To be called within `explained`. Raises `HttpRefused` for any status but 2xx, and for a `success: false`.
    """
    if content_encoding.lower() not in ("", "identity"):
        raise ValueError(f"compressed by {content_encoding}, though asked not to be")
    if not 200 <= status < 300:
        fix = "set policy.generation.sglang_cfg.api_key to the server's" if status in (401, 403) else ""
        raise HttpRefused(url=url, path=path, status=status, message=message_of(raw), fix=fix)
    if not raw.strip():
        return None
    try:
        reply = json.loads(raw)
    except ValueError as error:
        if "json" in content_type.lower():
            what = f"a reply that is not JSON: {raw[:100]!r}"
            raise ServerFault(what, url=url, where=f"server {url} {path}", fix=_LOG) from error
        return raw.decode(errors="replace")
    if isinstance(reply, dict) and reply.get("success") is False:
        raise HttpRefused(url=url, path=path, status=status, message=str(reply.get("message", reply))[:500])
    return reply


def message_of(raw: bytes) -> str:
    """The human part of an error reply, at most 500 characters."""
    text = raw.decode(errors="replace")
    try:
        reply = json.loads(text)
        while isinstance(reply, dict):
            reply = reply.get("message") or reply.get("error") or reply.get("detail") or text
        text = str(reply)
    except (ValueError, RecursionError):
        pass
    return text.strip()[:500]
