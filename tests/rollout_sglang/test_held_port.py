"""A held port: nobody else's, whether something listens there or not; and who has one that cannot be held."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from contextlib import contextmanager

import port_thief
import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang import held_port
from vespo_megatron.rollout_sglang.server import ports
from vespo_megatron.rollout_sglang.server.ports import give_up, hold_ports

LOOPBACK = "127.0.0.1"
LISTENER = """
import socket, sys
taken = socket.socket()
for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
    taken.setsockopt(socket.SOL_SOCKET, option, 1)
taken.bind(("127.0.0.1", int(sys.argv[1])))
if sys.argv[2] == "listens":
    taken.listen()
print("here", flush=True)
sys.stdin.readline()
try:
    taken.listen()
    print("listens", flush=True)
except OSError as error:
    print(error.strerror, flush=True)
"""


@contextmanager
def somebody_at(port, does, user=None):
    """Another process that has the port and lets others share it; bound and no more, until it is sent a line."""
    python = next(path for path in ("/usr/bin/python3", sys.executable) if os.path.exists(path))
    other = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    with subprocess.Popen(
        [python, "-I", "-c", LISTENER, str(port), does],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        **other,
    ) as process:
        try:
            assert process.stdout.readline() == "here\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def a_port():
    """The number of a port that was free a moment ago."""
    (port,) = hold_ports(LOOPBACK, 0, 1)
    port.give_up()
    return port.number


def connects(number):
    try:
        socket.create_connection((LOOPBACK, number), 5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_port_is_refused_held_served_and_free_in_turn(a_port):
    for _ in range(2):  # the second time after connections that fade out
        (port,) = hold_ports(LOOPBACK, a_port, 1)
        for _ in range(2):
            assert not connects(a_port)
            with held_port.listen_at(LOOPBACK, a_port) as listener:
                assert connects(a_port)
                listener.accept()[0].close()
        with pytest.raises(UserError, match=f"port {a_port} of 127.0.0.1 is in use"):
            hold_ports(LOOPBACK, a_port, 1)
        port.give_up()


@pytest.mark.parametrize("does", ["listens", "binds"])
def test_another_user_has_no_way_to_a_held_port(a_port, does):
    """Not even where he was there first without listening: then he never will."""
    if os.getuid() != 0:
        pytest.skip("only root can be another user")
    with somebody_at(a_port, does, user=port_thief.NOBODY) as thief:
        if does == "listens":
            with pytest.raises(UserError, match=rf"is in use by process {thief.pid} \(python3.*\) of user nobody"):
                hold_ports(LOOPBACK, a_port, 1)
            return
        (port,) = hold_ports(LOOPBACK, a_port, 1)
        thief.stdin.write("\n")
        thief.stdin.flush()
        assert thief.stdout.readline() == os.strerror(errno.EADDRINUSE) + "\n"
        with held_port.listen_at(LOOPBACK, a_port):
            assert connects(a_port)
        port.give_up()


def test_a_program_of_ones_own_that_shares_its_port_is_named(a_port):
    with somebody_at(a_port, "listens") as other:
        with pytest.raises(UserError, match=rf"is in use by process {other.pid} \(python3.*\) of user ") as caught:
            hold_ports("localhost", a_port, 1)
        assert "sglang_cfg.port" in str(caught.value)


def test_of_several_ports_all_are_held_or_none(a_port):
    with somebody_at(a_port, "listens"):
        with pytest.raises(UserError):
            hold_ports(LOOPBACK, a_port - 1, 2)
        held_port.hold(LOOPBACK, a_port - 1).close()


def test_a_free_port_that_is_lost_is_exchanged_for_another_so_many_times(monkeypatch):
    hold, lost = held_port.hold, []

    def loses(host, port):
        if len(lost) < losses:
            lost.append(host)
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        return hold(host, port)

    monkeypatch.setattr(held_port, "hold", loses)
    losses = 3
    give_up(hold_ports(LOOPBACK, 0, 1))
    lost.clear()
    losses = 1000
    with pytest.raises(UserError, match="has no free port"):
        hold_ports(LOOPBACK, 0, 1)
    assert len(lost) == ports._TRIES


def test_a_name_becomes_the_one_address_that_is_listened_on():
    """A client that asked for `localhost` again could be sent to ::1, where somebody else may be."""
    (port,) = hold_ports("localhost", 0, 1)
    assert port.url == f"http://127.0.0.1:{port.number}"
    port.give_up()


def test_an_ipv6_address_stands_in_brackets():
    if not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("this machine has no IPv6")
    (port,) = hold_ports("::1", 0, 1)
    assert port.url == f"http://[::1]:{port.number}"
    with held_port.listen_at("::1", port.number), pytest.raises(UserError, match=r"in use by process \d+ "):
        hold_ports("::1", port.number, 1)
    port.give_up()


@pytest.mark.parametrize(("host", "says"), [("no.such.host.invalid", "has no address"), ("192.0.2.1", "no address of")])
def test_a_host_that_is_not_here_is_named(host, says):
    with pytest.raises(UserError, match=says) as caught:
        hold_ports(host, 0, 1)
    assert "sglang_cfg.host" in str(caught.value)
