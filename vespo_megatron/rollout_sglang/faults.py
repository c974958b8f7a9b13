"""Errors of rollout servers, by type and with the server's URL: what the pool acts on, and names where it cannot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

from vespo_megatron.errors import UserError


class ServerFault(UserError):
    """One server answered wrongly or too late: its prompts may go to another one.

    Args:
        url: of the server.
        where: more than the server, for instance the endpoint or the request; None is the server alone.
    """

    def __init__(self, what: str, *, url: str, where: str | None = None, expected: str = "", fix: str = "") -> None:
        self.url = url
        super().__init__(what, where=f"server {url}" if where is None else where, expected=expected, fix=fix)

    @classmethod
    def of(cls, error: UserError, url: str) -> Self:
        """The same message as this kind of fault of the server at `url`."""
        return cls(error.what, url=url, where=error.where, expected=error.expected, fix=error.fix)


class ServerGone(ServerFault):
    """One server cannot be reached, or no longer shows that it works: it may come back, with old weights."""


class HttpRefused(ServerFault):
    """One server answered a call with another HTTP status than 200, or with `success: false`.

    Args:
        status: of the reply.
        message: the human part of the reply.
    """

    def __init__(self, *, url: str, path: str, status: int, message: str, fix: str = "") -> None:
        self.path, self.status, self.message = path, status, message
        what = f"refused: {message}" if status == 200 else f"answered {status}: {message}"
        super().__init__(what, url=url, where=f"server {url} {path}", fix=fix)


class PluginMissing(ServerFault):
    """One server runs without this package's plugin, which answers for its weights."""

    def __init__(self, *, url: str) -> None:
        super().__init__(
            "has no vespo_weights plugin, which the checksum of a weight update needs",
            url=url,
            fix="pip install --no-deps this package into the server's environment and restart it",
        )


class ChecksumMismatch(ServerFault):
    """One server holds other weights after an update than the trainer streamed."""


class ServersFailed(UserError):
    """Several servers failed at once, or one call failed on several.

    Args:
        faults: one or more, each with its server's URL.
    """

    def __init__(self, what: str, *, faults: Sequence[ServerFault], where: str, fix: str = "") -> None:
        self.faults = tuple(faults)
        super().__init__(f"{what}:\n{list_faults(faults)}", where=where, fix=fix)


class WeightsNeeded(UserError):
    """Servers wait for weights before they can serve (again): update them, under the same version, and go on.

    Raised by `generate` when no server is left that holds the current weights but one has come back, after whatever
    arrived was given to `on_result`; and by `update_weights` when a server failed in it and others can go on.

    Args:
        faults: of the servers that failed, where that is the reason.
    """

    def __init__(
        self, what: str, *, where: str = "", expected: str = "", fix: str = "", faults: Sequence[ServerFault] = ()
    ) -> None:
        self.faults = tuple(faults)
        super().__init__(what, where=where, expected=expected, fix=fix)


def faults_of(error: UserError) -> tuple[ServerFault, ...]:
    """The servers' faults that an error is about; none where it is about something else."""
    if isinstance(error, ServerFault):
        return (error,)
    return error.faults if isinstance(error, ServersFailed | WeightsNeeded) else ()


def as_one_error(faults: Sequence[ServerFault]) -> ServerFault | ServersFailed:
    """The only fault, or one error that names each with its server, for one or more faults."""
    if len(faults) == 1:
        return faults[0]
    return ServersFailed(f"{len(faults)} faults", faults=faults, where="rollout servers")


def list_faults(faults: Iterable[UserError]) -> str:
    """One indented line or more per fault."""
    return "\n".join(f"  {fault.where}: {fault.what}" for fault in faults)
