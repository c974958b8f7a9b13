"""Where the ranks of a run meet: a file that its user alone can write, or a store on one named address.

torch's own TCP store listens on every address of the machine and asks nobody who they are; whoever writes in it says
where a rank's peers are, and ranks unpickle what peers send (docs/security.md).
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from vespo_megatron.errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

FILE_VARIABLE = "VESPO_RENDEZVOUS"
"""The file where the ranks of one machine meet; its folder is its user's alone."""


def open_store(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """The store this process joins its peers in, as its environment says.

    One process needs none outside itself. Several on one machine have a file. On several machines rank 0 listens at
    MASTER_ADDR:MASTER_PORT, unless whoever started the ranks already does (TORCHELASTIC_USE_AGENT_STORE: torchrun).

    Raises:
        UserError: the environment says nothing; rank 0 cannot listen at that address.
    """
    import torch.distributed as dist  # here: who starts ranks needs this module's variable, and no torch

    if file := os.environ.get(FILE_VARIABLE):
        return dist.FileStore(file, world_size)
    if world_size == 1:
        return dist.HashStore()
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError(
            "do not say where the ranks meet",
            where="MASTER_ADDR and MASTER_PORT",
            fix="start the ranks by vespo-megatron train, vespo-megatron slurm or torchrun",
        ) from None
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return listening_store(address, port, world_size, timeout_s)
    return dist.TCPStore(address, port, world_size, is_master=False, timeout=timedelta(seconds=timeout_s))


def listening_store(address: str, port: int, world_size: int, timeout_s: float) -> dist.TCPStore:
    """A store that listens on `address` alone (port 0: on any free one), and waits for nobody.

    Raises:
        UserError: the address is not this machine's, or the port is in use.
    """
    import torch.distributed as dist

    try:
        family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(1024)
    except OSError as error:
        raise UserError(
            f"cannot be listened on: {error.strerror or error}",
            where=f"{address}:{port}, where the ranks meet",
            expected="an address of the machine that rank 0 runs on, and a free port",
        ) from None
    return dist.TCPStore(
        address,
        listener.getsockname()[1],
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=True,
    )
