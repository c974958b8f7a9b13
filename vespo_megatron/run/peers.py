"""Who has connected to this process: on one machine, a connection of another user's is refused.

gloo and NCCL ask nobody who they are, and what the ranks of a run send each other is unpickled. Linux says whose the
other end of a connection is as long as it is on this machine; of another machine's it says nothing.
"""

from __future__ import annotations

import os

from vespo_megatron.errors import UserError
from vespo_megatron.run.sockets import ESTABLISHED, LISTENING, own_sockets, tcp_sockets

_ROOT = 0


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
    sockets, mine = tcp_sockets(), own_sockets()
    ports = {each.port for each in sockets if each.state == LISTENING and each.inode in mine}
    connected = [each for each in sockets if each.state == ESTABLISHED]
    accepted = {(each.remote, each.local) for each in connected if each.inode in mine and each.port in ports}
    return {each.user for each in connected if (each.local, each.remote) in accepted}
