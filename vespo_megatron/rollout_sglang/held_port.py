"""A port that stays one user's: held by a socket that never listens, beside which his own programs listen.

A port that is chosen, let go and bound by a server half a minute later is anybody's in between, and again whenever the
server is dead; whoever takes it is sent the key. Here the launcher holds it from the choice to the end. Linux gives an
address to a second socket where both have SO_REUSEPORT and one user, to no other; and nobody connects to a socket that
does not listen, so that a dead server is refused as one without the first socket would be.

Standard library alone: the servers' environment imports this.
"""

from __future__ import annotations

import socket

_BACKLOG = 2048
"""uvicorn's."""


def resolve(host: str) -> tuple[socket.AddressFamily, str]:
    """The address of a name, in figures; IPv4 where it has both. Raises `OSError` for one that has none."""
    found = [(each[0], str(each[4][0])) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    return min(found, key=lambda each: each[0] != socket.AF_INET)


def hold(host: str, port: int) -> socket.socket:
    """A socket at that port (0: at a free one), which no other user's program can listen at until it is closed.

    Raises `OSError` where somebody has it.
    """
    family, address = resolve(host)
    held = socket.socket(family)
    try:
        # Connections of a server that was there before may still fade out; a free port has none.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(port != 0))
        held.bind((address, port))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listen_at(address, held.getsockname()[1]).close()  # who began to before the last two lines is found here
    except BaseException:
        held.close()
        raise
    return held


def listen_at(host: str, port: int) -> socket.socket:
    """A socket that listens there: where the port is held, for its holder's user alone. Raises `OSError`."""
    family, address = resolve(host)
    listener = socket.socket(family)
    try:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            listener.setsockopt(socket.SOL_SOCKET, option, 1)
        listener.bind((address, port))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
