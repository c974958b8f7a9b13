"""One SGLang server as a process group that this process started, with a supervisor and a log: nothing outlives it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.api_key import VARIABLE as API_KEY_VARIABLE
from vespo_megatron.rollout_sglang.client.control import call
from vespo_megatron.rollout_sglang.server import supervisor
from vespo_megatron.rollout_sglang.server.ports import Port

_GRACE_S = 1.0
"""SGLang 0.5.23 looks for SIGTERM every 5 s and then drains; what it runs is ours, and we are stopping too."""


class ServerProcess:
    """One SGLang server that this process started, and starts again on the same port after it died.

    Args:
        port: where the command listens (`held_port.listen_at`); held for it until `stop`, whether it lives or not.
        command: what to run.
        environment: all of its environment variables.
        log: its output; after a restart `<stem>.restart_<n>.log` beside it.
    """

    def __init__(self, port: Port, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.url, self.log, self.port = port.url, log, port
        self._command, self._environment, self._first_log = command, environment, log
        self.restarts = 0
        self._process = self._start()

    def _start(self) -> subprocess.Popen:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, str(_GRACE_S), *self._command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def restart(self) -> None:
        """Start again after its end: same port, same flags, the checkpoint's weights. Returns at once."""
        self.end()  # its supervisor may have been killed, and have left others of its group
        self.restarts += 1
        self.log = self._first_log.with_name(f"{self._first_log.stem}.restart_{self.restarts}.log")
        self._process = self._start()

    @property
    def process_group(self) -> int:
        """The group everything of this server belongs to."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the server's process still runs (not whether it answers)."""
        return self._process.poll() is None

    def wait_ready(self, deadline: float) -> None:
        """Return once the server answers; raises `UserError` as soon as it is dead, or at the deadline.

        Args:
            deadline: on `time.monotonic()`'s clock.
        """
        while True:
            if not self.alive:
                raise UserError(
                    f"SGLang died while starting:\n{log_tail(self.log)}",
                    where=f"server {self.url}",
                    fix=f"see {self.log}",
                )
            if self.answers():
                return
            if time.monotonic() > deadline:
                raise UserError(
                    f"SGLang was not ready in time; its last lines:\n{log_tail(self.log)}",
                    where=f"server {self.url}",
                    fix=f"raise policy.generation.sglang_cfg.startup_timeout, or see {self.log}",
                )
            time.sleep(0.1)

    def answers(self) -> bool:
        """Whether it does now, within 2 s."""
        try:
            call(self.url, "/model_info", timeout_s=2.0, api_key=self._environment.get(API_KEY_VARIABLE))
        except UserError:
            return False
        return True

    def ask_to_stop(self) -> None:
        """Let the supervisor end the group; returns at once."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()

    def stop(self) -> None:
        """End it for good: its port is anybody's then. Idempotent, bounded by the grace and 10 s."""
        self.end()
        self.port.give_up()

    def end(self) -> None:
        """End every process of the server's group; it may start again. Idempotent, bounded as `stop`."""
        self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S + 5)
        # The supervisor has done this, unless it was killed itself.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process_group, signal.SIGKILL)
        self._process.wait(5)


def log_tail(log: Path, lines: int = 12) -> str:
    """What a person wants to see of a dead server's log: its last error lines, or just its last ones."""
    try:
        text = log.read_text(errors="replace").splitlines()
    except OSError:
        return "  (no log)"
    text = [line for line in text if line.strip() and not line.startswith("[vespo-megatron]")]
    telling = re.compile(r"(Error|Exception|error:|Killed|out of memory|assert)")
    marks = [number for number, line in enumerate(text) if telling.search(line)]
    end = marks[-1] + 1 if marks else len(text)
    # Of a refused flag SGLang prints pages of usage before the one line that says which.
    refused = re.match(r"[\w .-]+: error: ", text[end - 1]) if text else None
    return "\n".join(f"  {line[:300]}" for line in text[end - 1 if refused else max(0, end - lines) : end])
