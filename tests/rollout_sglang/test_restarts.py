"""`ServerGroup.restart_dead`: the dead are started again, so often, on their port; the end of the last is an error."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.server.ports import hold_ports
from vespo_megatron.rollout_sglang.server.server_group import ServerGroup
from vespo_megatron.rollout_sglang.server.server_process import ServerProcess


@pytest.fixture
def group(tmp_path):
    """Two processes that stay, in place of SGLang."""
    command = [sys.executable, "-S", "-c", "import time; print('a server', flush=True); time.sleep(60)"]
    servers = [
        ServerProcess(port, command, dict(os.environ), tmp_path / f"server_{number}.log")
        for number, port in enumerate(hold_ports("127.0.0.1", 0, 2), 1)
    ]
    with ServerGroup(servers, [server.url for server in servers], max_restarts=2) as group:
        yield group


def kill(server):
    os.kill(server.process_group, signal.SIGKILL)
    until(lambda: not server.alive)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_dead_server_is_started_again_with_a_log_of_its_own(group, capsys):
    first, second = group.servers
    before, untouched = first.process_group, second.process_group
    kill(first)
    group.restart_dead()
    assert first.alive and first.process_group != before and second.process_group == untouched
    assert first.log.name == "server_1.restart_1.log" and first._first_log.exists()
    output = capsys.readouterr().out
    assert f"{first.url} died" in output and "restart 1 of 2" in output and "server_1.log" in output
    group.restart_dead()
    assert first.restarts == 1


def test_a_server_stays_down_after_its_last_restart_and_the_other_goes_on(group, capsys):
    first, _ = group.servers
    for _ in range(3):
        kill(first)
        group.restart_dead()
    group.restart_dead()
    assert not first.alive and first.restarts == 2
    assert capsys.readouterr().out.count("stays down") == 1


def test_the_end_of_the_last_server_is_the_error(group):
    group.max_restarts = 0
    first, second = group.servers
    kill(first)
    group.restart_dead()
    kill(second)
    with pytest.raises(UserError, match="SGLang died") as caught:
        group.restart_dead()
    assert second.url in str(caught.value) and "server_2.log" in str(caught.value)


def test_a_thread_tends_while_the_process_has_other_things_to_do(group):
    first, _ = group.servers
    with group.supervised():
        kill(first)
        until(lambda: first.restarts == 1 and first.alive)
    kill(first)
    time.sleep(0.7)
    assert first.restarts == 1
