"""A connection of another user's to a process of a run."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.run.peers import refuse_strangers

CONNECT = "exec 3<>/dev/tcp/127.0.0.1/$0; echo connected; read <&3"


@pytest.mark.parametrize("dual_stack", [False, True])
@pytest.mark.parametrize("user", [pytest.param(65534, id="nobody"), pytest.param(0, id="root")])
def test_only_a_stranger_is_refused(user, dual_stack):
    if os.getuid() != 0:
        pytest.skip("only root can be another user")
    family, address = (socket.AF_INET6, "::") if dual_stack else (socket.AF_INET, "127.0.0.1")
    with socket.create_server((address, 0), family=family, dualstack_ipv6=dual_stack) as server:
        port = str(server.getsockname()[1])
        with subprocess.Popen(["bash", "-c", CONNECT, port], user=user, stdout=subprocess.PIPE) as other:
            try:
                connection, _ = server.accept()
                assert other.stdout.readline() == b"connected\n"
                with connection:
                    if user == 0:
                        refuse_strangers()
                    else:
                        with pytest.raises(UserError, match="user 65534 of this machine has connected"):
                            refuse_strangers()
            finally:
                other.kill()
    refuse_strangers()
