"""Signals become one exception, failures one note per rank."""

from __future__ import annotations

import os
import signal
import time

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.run.processes import Stopped, clear_failures, note_failure, read_failure, stop_on_signals


@pytest.fixture
def handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_raises_once_and_handlers_come_back(handlers, signum):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pytest.raises(Stopped) as stopped, stop_on_signals():
        try:
            os.kill(os.getpid(), signum)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signum)  # impatience does not interrupt the clean-up
            cleaned_up = True
    assert cleaned_up and stopped.value.exit_code == 128 + signum
    assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]


def test_nohup_stays_in_force(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGHUP)


def test_an_explained_error_is_told_before_the_tracebacks_it_caused(tmp_path):
    assert note_failure(tmp_path, 0, RuntimeError("peer went away")) == 1
    assert note_failure(tmp_path, 3, UserError("is gone", where="expert 7")) == 2
    assert read_failure(tmp_path) == ("expert 7: is gone", True)
    clear_failures(tmp_path)
    assert read_failure(tmp_path) is None


def test_the_first_traceback_is_told_with_its_rank(tmp_path):
    note_failure(tmp_path, 1, RuntimeError("first"))
    time.sleep(0.02)
    note_failure(tmp_path, 0, RuntimeError("second"))
    text, explained = read_failure(tmp_path)
    assert not explained and text.startswith("rank 1 failed") and "first" in text and "second" not in text
