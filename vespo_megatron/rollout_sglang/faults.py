"""What can be wrong with one server: errors that the pool acts on where it can, and that name the server where not."""

from __future__ import annotations

from vespo_megatron.errors import UserError


class ServerFault(UserError):
    """One server answered wrongly or too late: its prompts may go to another one."""


class ServerGone(ServerFault):
    """One server cannot be reached, or no longer shows that it works: it may come back, with old weights."""


class WeightsNeeded(UserError):
    """Servers wait for weights before they can serve (again): update them, under the same version, and go on.

    Raised by `generate` when no server is left that holds the current weights but one has come back, after whatever
    arrived was given to `on_result`; and by `update_weights` when a server failed in it and others can go on.
    """


def as_fault(error: UserError, kind: type[ServerFault] = ServerFault) -> ServerFault:
    """The same message, as a fault of the server it names."""
    if isinstance(error, ServerFault):
        return error
    return kind(error.what, where=error.where, expected=error.expected, fix=error.fix)
