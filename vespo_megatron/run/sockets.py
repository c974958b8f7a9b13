"""TCP sockets of this machine and their owners, as Linux lists them (`/proc/net/tcp`)."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ESTABLISHED, LISTENING = "01", "0A"
_MAPPED = "0000000000000000FFFF0000"
"""What an IPv4 address begins with where an IPv6 socket talks to it."""


class TcpSocket(NamedTuple):
    """One line of the list. Addresses are hexadecimal, `address:port`; an IPv4 address has eight digits."""

    local: str
    remote: str
    state: str
    user: int
    inode: str

    @property
    def port(self) -> int:
        """Of this end."""
        return int(self.local.rpartition(":")[2], 16)

    @property
    def is_at_any_address(self) -> bool:
        """Whether it takes what comes to any address of the machine."""
        return not self.local.rpartition(":")[0].strip("0")


def tcp_sockets() -> list[TcpSocket]:
    """All of this machine's (of its network namespace)."""
    columns = [
        line.replace(_MAPPED, "").split() for name in ("tcp", "tcp6") for line in _lines(Path("/proc/self/net", name))
    ]
    # Slot, local, remote, state, …, user (7), …, inode (9).
    return [TcpSocket(each[1], each[2], each[3], int(each[7]), each[9]) for each in columns]


def own_sockets(process: str = "self") -> set[str]:
    """Inodes of a process's sockets; none of a process that this one may not look into."""
    found: set[str] = set()
    try:
        numbers = os.listdir(f"/proc/{process}/fd")
    except OSError:
        return found
    for number in numbers:
        try:
            target = os.readlink(f"/proc/{process}/fd/{number}")
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target.removeprefix("socket:[").removesuffix("]"))
    return found


def who_has(address: str, port: int) -> str:
    """For instance "process 4711 (python3) of user nobody", as far as the kernel says; empty where it says nothing.

    Args:
        address: IPv4 or IPv6, in figures.
    """
    sockets = [each for each in tcp_sockets() if each.port == port]
    here = [each for each in sockets if each.is_at_any_address or _is_at(each, address)]
    if not here:
        return ""
    found = min(here, key=lambda each: each.state != LISTENING)
    user = f"user {_name(found.user)}"
    process = _process_with(found.inode, filter(str.isdigit, os.listdir("/proc")))
    return user if process is None else f"{process} of {user}"


def _is_at(listed: TcpSocket, address: str) -> bool:
    version = socket.AF_INET6 if ":" in address else socket.AF_INET
    raw = socket.inet_pton(version, address)
    # Words of four bytes, each with its last byte first.
    words = "".join(raw[start : start + 4][::-1].hex() for start in range(0, len(raw), 4))
    return listed.local.rpartition(":")[0] == words.upper() or not any(raw)


def _process_with(inode: str, processes: Iterable[str]) -> str | None:
    for process in processes:
        if inode in own_sockets(process):
            try:
                return f"process {process} ({Path('/proc', process, 'comm').read_text().strip()})"
            except OSError:
                return f"process {process}"
    return None


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()[1:]
    except OSError:  # a machine without IPv6
        return []
