"""Ports that servers are to listen on, held before any server starts and until all have ended."""

from __future__ import annotations

import errno
import socket

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang import held_port
from vespo_megatron.run.sockets import who_has

_TRIES = 8
"""Free ports that are tried: somebody may take one between the kernel's choice and ours."""
_WHERE = "policy.generation.sglang_cfg"


class Port:
    """A port of this machine that no other user's program can listen on, until it is given up (see `held_port`).

    Args:
        held: what holds it.
    """

    def __init__(self, held: socket.socket) -> None:
        self._held = held
        self.address, self.number = held.getsockname()[:2]
        """In figures: a name could stand for another address too, where somebody else listens."""

    @property
    def url(self) -> str:
        """Of a server there."""
        return (
            f"http://[{self.address}]:{self.number}" if ":" in self.address else f"http://{self.address}:{self.number}"
        )

    @property
    def handle(self) -> int:
        """The open file that holds it; a process that has it open holds it too."""
        return self._held.fileno()

    def give_up(self) -> None:
        """It is anybody's from now on; idempotent."""
        self._held.close()


def hold_ports(host: str, first: int, count: int) -> list[Port]:
    """`count` ports from `first` on, or free ones when it is 0.

    Raises `UserError` naming one that is in use, and by whom.
    """
    held: list[Port] = []
    try:
        held.extend(Port(_hold(host, first + offset if first else 0)) for offset in range(count))
    except BaseException:
        give_up(held)
        raise
    return held


def give_up(ports: list[Port]) -> None:
    """They are anybody's from now on."""
    for port in ports:
        port.give_up()


def _hold(host: str, port: int) -> socket.socket:
    tries = 1 if port else _TRIES
    while True:
        tries -= 1
        try:
            return held_port.hold(host, port)
        except socket.gaierror as error:
            raise UserError(f"{host} has no address ({error.strerror})", where=f"{_WHERE}.host") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE and tries:
                continue
            raise _explained(host, port, error) from error


def _explained(host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRNOTAVAIL:
        return UserError(f"{host} is no address of this machine", where=f"{_WHERE}.host")
    if error.errno != errno.EADDRINUSE:
        return UserError(f"port {port} of {host} cannot be used ({error.strerror})", where=f"{_WHERE}.port")
    if not port:
        return UserError(f"{host} has no free port; {_TRIES} were tried", where=f"{_WHERE}.port")
    who = who_has(held_port.resolve(host)[1], port)
    return UserError(
        f"port {port} of {host} is in use" + (f" by {who}" if who else ""),
        where=f"{_WHERE}.port",
        fix="stop what listens there, choose another port, or 0 for a free one",
    )
