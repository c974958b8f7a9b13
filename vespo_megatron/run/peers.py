"""Who has connected to this process: on one machine, a connection of another user's is refused.

gloo and NCCL ask nobody who they are, and what the ranks of a run send each other is unpickled. Linux says whose the
other end of a connection is as long as it is on this machine (`/proc/net/tcp`); of another machine's it says nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from vespo_megatron.errors import UserError

_ESTABLISHED, _LISTENING = "01", "0A"
_ROOT = 0
_MAPPED = "0000000000000000FFFF0000"
"""What an IPv4 address begins with where an IPv6 socket talks to it."""


def refuse_strangers() -> None:
    """To be called when every peer has connected, before anything that they send is unpickled.

    Raises:
        UserError: a process of another user than this one's (and root) is connected to a port this process listens on.
    """
    if strangers := sorted(_users() - {os.getuid(), _ROOT}):
        raise UserError(
            f"user {', '.join(map(str, strangers))} of this machine has connected to it",
            where=f"a trainer process (user {os.getuid()})",
            expected="connections of its peers alone",
            fix="find out what that user runs; see docs/security.md",
        )


def _users() -> set[int]:
    """Who holds the other ends, on this machine, of what this process has accepted."""
    entries = [
        line.replace(_MAPPED, "").split() for name in ("tcp", "tcp6") for line in _lines(Path("/proc/self/net", name))
    ]
    mine = _sockets()
    # Columns: slot, local, remote, state, …, user (7), …, inode (9).
    ports = {_port(entry[1]) for entry in entries if entry[3] == _LISTENING and entry[9] in mine}
    accepted = {
        (entry[2], entry[1])
        for entry in entries
        if entry[3] == _ESTABLISHED and entry[9] in mine and _port(entry[1]) in ports
    }
    return {int(entry[7]) for entry in entries if entry[3] == _ESTABLISHED and (entry[1], entry[2]) in accepted}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()[1:]
    except OSError:  # a machine without IPv6
        return []


def _port(address: str) -> str:
    return address.rpartition(":")[2]


def _sockets() -> set[str]:
    """Inodes of this process's sockets."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target.removeprefix("socket:[").removesuffix("]"))
    return found
