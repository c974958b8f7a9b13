"""What processes listen on."""

from __future__ import annotations

import socket

import psutil


def listening(processes) -> set[tuple[str, int]]:
    """(address, port) of everything that these processes take connections or datagrams on."""
    found = set()
    for process in processes:
        for each in process.net_connections("inet"):
            if each.status == psutil.CONN_LISTEN or (each.type == socket.SOCK_DGRAM and not each.raddr):
                found.add((each.laddr.ip, each.laddr.port))
    return found
