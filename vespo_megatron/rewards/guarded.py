"""A process that answers one call at a time under a deadline, ended and replaced when an answer takes too long.

Math-Verify can hang on hostile expressions, and so can anybody's own reward or environment; no thread or signal stops
them all.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from vespo_megatron.errors import UserError

TIMEOUT, ERROR, DIED = FAILURES = ("timeout", "error", "died")
"""Why an answer does not come: late, what was called raised, or the process ended with it."""
_START_TIMEOUT = 120.0
"""Seconds a process has to import what it calls."""
_STARTS = 3
"""Attempts to start a process that ends before it is ready."""
_ORPHAN_GRACE = 2.0
"""Seconds after the deadline at which a process that nobody has ended ends itself."""


class NoAnswer(Exception):
    """`kind` of `FAILURES`; `failure` is the exception that was raised, for a message, where one was."""

    def __init__(self, kind: str, failure: str = "") -> None:
        super().__init__(kind, failure)
        self.kind, self.failure = kind, failure


class GuardedProcess:
    """One process; forked from a server that has imported what is slow, so that replacing it takes milliseconds.

    Args:
        make: called in the process, with `arguments`; what it returns takes a request and answers it.
        timeout: seconds for one answer.
        name: what it is, for errors; for instance 'reward math'.
    """

    def __init__(self, make: Callable[..., Callable[[Any], Any]], arguments: tuple, timeout: float, name: str) -> None:
        self._make, self._arguments, self._timeout, self._name = make, arguments, timeout, name
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["vespo_megatron.rewards.preload"])
        self._ready = self._closed = False
        self._start()

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        _set_deadline(self._connection, self._timeout)
        self._process = self._context.Process(
            target=_serve, args=(theirs, self._make, self._arguments, self._timeout), daemon=True
        )
        self._process.start()
        theirs.close()
        self._ready = False

    def call(self, request: Any) -> Any:
        """What the process answers.

        Raises:
            NoAnswer: late or died, and the process is another one from now on.
            UserError: it cannot even start.
        """
        self._await_start()
        try:
            self._connection.send(request)
            if self._connection.poll(self._timeout):
                return self._connection.recv()
            kind = TIMEOUT
        except BlockingIOError:
            kind = TIMEOUT  # it takes nothing more, or says nothing more
        except (EOFError, OSError):
            kind = DIED
        self._restart()
        raise NoAnswer(kind)

    def _await_start(self) -> None:
        """Until it has what it calls. One that was killed is replaced: only what ends every one is a mistake."""
        for _ in range(_STARTS):
            if self._ready and self._connection.poll():  # while it had nothing to do, it has ended
                self._restart()
            if self._ready:
                return
            if not self._connection.poll(_START_TIMEOUT):
                raise UserError(f"did not start within {_START_TIMEOUT:.0f} s", where=self._name)
            try:
                why = self._connection.recv()
            except (EOFError, OSError):
                self._restart()
                continue
            if why:
                raise UserError(why, where=self._name, fix="mend it, or its arguments in the recipe")
            self._ready = True
        if not self._ready:
            raise UserError(f"ended at once, {_STARTS} times", where=self._name, fix="run it by hand")

    def _restart(self) -> None:
        self._end()
        if not self._closed:
            self._start()

    def close(self) -> None:
        """End it for good; idempotent. A call that waits meanwhile gets no answer."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join(5)


def _set_deadline(connection: Connection, seconds: float) -> None:
    """A process that is stopped takes or gives no more than fits into the pipe: neither end waits for ever."""
    deadline = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6) or 1)
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, deadline)


def _serve(connection: Connection, make: Callable[..., Callable[[Any], Any]], arguments: tuple, timeout: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        answer = make(*arguments)
    except Exception as error:
        connection.send(f"raised when it was made: {type(error).__name__}: {error}")
        return
    connection.send("")
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):  # who asks has ended, or was killed
            return
        # The kernel ends an answer that hangs even when who would is gone.
        signal.setitimer(signal.ITIMER_REAL, timeout + _ORPHAN_GRACE)
        result = answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        with suppress(OSError):
            connection.send(result)
