"""Servers of shared devices start while the trainer is away from them, and the trainer waits for one that does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.server.ports import hold_ports
from vespo_megatron.rollout_sglang.server.server_group import ServerGroup
from vespo_megatron.rollout_sglang.server.server_process import ServerProcess
from vespo_megatron.rollout_sglang.start_lock import StartLock


def test_one_of_a_process_holds_it_and_may_ask_again(tmp_path):
    first, second = StartLock(tmp_path), StartLock(tmp_path / ".." / tmp_path.name)
    assert first.try_acquire() and first.try_acquire() and not second.try_acquire()
    with pytest.raises(UserError, match=r"has not been ready within 0\.1 s"):
        second.acquire(0.1)
    threading.Timer(0.1, first.release).start()
    second.acquire(5)
    assert second.held and not first.held
    first.release()
    second.release()
    assert first.try_acquire()
    first.release()


def hold(folder, held, over):
    lock = StartLock(folder)
    lock.acquire(5)
    held.set()
    over.wait(30)


def test_the_kernel_ends_the_hold_of_a_process_that_dies(tmp_path):
    context = multiprocessing.get_context("fork")
    held, over = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, held, over))
    process.start()
    assert held.wait(10)
    lock = StartLock(tmp_path)
    assert not lock.try_acquire()
    process.kill()
    process.join(10)
    lock.acquire(5)
    lock.release()


class Stubborn(ServerProcess):
    """A process that stays, in place of SGLang; it answers when the test says so."""

    ready = False

    def answers(self):
        return self.ready


@pytest.fixture
def group(tmp_path):
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    (port,) = hold_ports("127.0.0.1", 0, 1)
    server = Stubborn(port, command, dict(os.environ), tmp_path / "server.log")
    lock = StartLock(tmp_path)
    with ServerGroup([server], [server.url], max_restarts=2, start_lock=lock, start_timeout_s=20) as group:
        yield group


def kill(server):
    os.kill(server.process_group, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while server.alive:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_dead_server_waits_for_the_trainer_and_then_the_trainer_for_it(group, tmp_path, capsys):
    (server,), trainer = group.servers, StartLock(tmp_path)
    assert trainer.try_acquire()
    kill(server)
    for _ in range(3):
        group.restart_dead()
    assert server.restarts == 0 and capsys.readouterr().out.count("when the trainer leaves its devices") == 1
    trainer.release()
    group.restart_dead()
    assert server.restarts == 1 and server.alive
    group.restart_dead()
    assert not trainer.try_acquire(), "the server is not ready"
    server.ready = True
    group.restart_dead()
    assert trainer.try_acquire()
    trainer.release()


def test_a_start_that_fails_or_takes_too_long_keeps_nobody_waiting(group, tmp_path, capsys):
    (server,), trainer = group.servers, StartLock(tmp_path)
    kill(server)
    group.restart_dead()
    kill(server)
    group._start_timeout_s = 0.0
    group.restart_dead()
    assert trainer.try_acquire(), "it comes before the second start"
    trainer.release()
    group.restart_dead()
    assert server.restarts == 2 and not trainer.try_acquire()
    time.sleep(0.01)
    group.restart_dead()
    with pytest.raises(UserError, match="SGLang died and was restarted 2 times"):
        group.restart_dead()
    assert "was not ready within 0 s" in capsys.readouterr().out
    assert trainer.try_acquire()
    trainer.release()
