"""Another user of the machine who wants a server's port: tries to take it as soon as the process list shows it.

`PortThief` runs this file as `nobody`, with a Python that has no package of ours.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path

NOBODY = 65534


class PortThief:
    """A context manager: the thief, at every port that a command line with `mark` among its words names.

    Args:
        mark: a word of the servers' command lines that no other process has.
        notes: a file for what it does; `nobody` need not have access to it.
    """

    def __init__(self, mark: str, notes: Path) -> None:
        self._mark, self._notes = mark, notes

    def __enter__(self) -> PortThief:
        python = next(path for path in ("/usr/bin/python3", sys.executable) if os.path.exists(path))
        with self._notes.open("wb") as notes:
            self._process = subprocess.Popen(
                [python, "-I", "-c", Path(__file__).read_text(), self._mark],
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
                cwd="/",
                stdout=notes,
                stderr=subprocess.STDOUT,
            )
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait(10)

    @property
    def tried(self) -> int:
        """How often it has tried to take a port."""
        return sum(line.startswith("tried") for line in self._notes.read_text().splitlines())

    @property
    def took(self) -> list[str]:
        """The ports it has got, and all that was sent to it there."""
        return [line for line in self._notes.read_text().splitlines() if line.partition(" ")[0] != "tried"]


def find_ports(mark: str) -> set[int]:
    """Of `--port N` in the command lines that have the mark."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if mark in words[1:] and "--port" in words:
            found.add(int(words[words.index("--port") + 1]))
    return found


def take(port: int, *, reuse_address: int, reuse_port: int, address: str) -> socket.socket | None:
    """A socket that listens there, where the kernel lets us."""
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse_address)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)
    try:
        taken.bind((address, port))
        taken.listen()
    except OSError:
        taken.close()
        return None
    return taken


def steal(mark: str) -> None:
    """Never returns. Whoever connects is told that all is well, and what he sends is printed."""
    ports: set[int] = set()
    ready = selectors.DefaultSelector()
    looked = 0.0
    while True:
        if time.monotonic() > looked + 0.2:
            ports |= find_ports(mark)
            looked = time.monotonic()
        for port in sorted(ports):
            for way in range(8):
                where = ("127.0.0.1", "0.0.0.0")[way >> 2]
                if taken := take(port, reuse_address=way & 1, reuse_port=way >> 1 & 1, address=where):
                    ready.register(taken, selectors.EVENT_READ)
                    print("took", port, flush=True)
            print("tried", port, flush=True)
        for key, _ in ready.select(0.02) if ready.get_map() else ():
            listener = key.fileobj
            assert isinstance(listener, socket.socket)
            connection, _ = listener.accept()
            connection.settimeout(1)
            try:
                print("was sent", connection.recv(65536), flush=True)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}")
            except OSError:
                pass
            connection.close()
        if not ready.get_map():
            time.sleep(0.02)


if __name__ == "__main__":
    steal(sys.argv[1])
