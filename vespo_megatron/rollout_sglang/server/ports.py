"""Ports that servers are to listen on, tried before any server starts."""

from __future__ import annotations

import errno
import socket

from vespo_megatron.errors import UserError


def choose_ports(host: str, first: int, count: int) -> list[int]:
    """`count` ports from `first` on, or free ones when it is 0; raises `UserError` naming one that is in use."""
    sockets = []
    try:
        for offset in range(count):
            port = first + offset if first else 0
            listener = socket.socket()
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                listener.listen(1)
            except OSError as error:
                reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
                raise UserError(
                    f"port {port} of {host} {reason}",
                    where="policy.generation.sglang_cfg.port",
                    fix="stop what listens there, choose another port, or 0 for a free one",
                ) from error
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()
