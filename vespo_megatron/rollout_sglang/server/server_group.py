"""Start and stop SGLang servers: a process group each, logs in the run directory, nothing left over."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rollout_sglang.api_key import VARIABLE as API_KEY_VARIABLE
from vespo_megatron.rollout_sglang.api_key import hide_api_key
from vespo_megatron.rollout_sglang.client.control import call
from vespo_megatron.rollout_sglang.model_shape import ModelShape
from vespo_megatron.rollout_sglang.server import supervisor
from vespo_megatron.rollout_sglang.server.flags import Environment, build_environment, build_flags, check_server_args
from vespo_megatron.run.host_threads import server_environment

_GRACE_S = 1.0
"""SGLang 0.5.23 looks for SIGTERM every 5 s and then drains; what it runs is ours, and we are stopping too."""
_LOOK_EVERY_S = 0.5
_PROBE = """
import importlib.metadata as metadata, importlib.util as util, json, sys
found = util.find_spec("sglang")
device, torchvision = sys.argv[1], util.find_spec("torchvision") is not None
if device == "auto":
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
if torchvision and device == "cpu":
    try:
        import torchvision.transforms
    except Exception:
        torchvision = False
plugins = {point.name for point in metadata.entry_points(group="sglang.srt.platforms")}
print(json.dumps(dict(device=device, torchvision=torchvision, plugin="vespo_cpu" in plugins,
    folder=list(found.submodule_search_locations)[0] if found else None)))
"""


class ServerProcess:
    """One SGLang server that this process started, and starts again on the same port after it died.

    Args:
        command: what to run.
        environment: all of its environment variables.
        log: its output; after a restart `<stem>.restart_<n>.log` beside it.
    """

    def __init__(self, url: str, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.url, self.log = url, log
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
        self.stop()  # its supervisor may have been killed, and have left others of its group
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
            try:
                call(self.url, "/model_info", timeout_s=2.0, api_key=self._environment.get(API_KEY_VARIABLE))
                return
            except UserError:
                pass
            if time.monotonic() > deadline:
                raise UserError(
                    f"SGLang was not ready in time; its last lines:\n{log_tail(self.log)}",
                    where=f"server {self.url}",
                    fix=f"raise policy.generation.sglang_cfg.startup_timeout, or see {self.log}",
                )
            time.sleep(0.1)

    def ask_to_stop(self) -> None:
        """Let the supervisor end the group; returns at once."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()

    def stop(self) -> None:
        """End every process of the server's group; idempotent, bounded by the grace and 10 s."""
        self.ask_to_stop()
        try:
            self._process.wait(_GRACE_S + 5)
        except subprocess.TimeoutExpired:
            pass
        try:  # the supervisor has done this, unless it was killed itself
            os.killpg(self.process_group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self._process.wait(5)


class ServerGroup:
    """The servers of one run; a context manager that stops them.

    Args:
        urls: of servers started here, or elsewhere.
        max_restarts: of each server.
    """

    def __init__(self, servers: list[ServerProcess], urls: list[str], *, max_restarts: int = 0) -> None:
        self.servers, self.urls, self.max_restarts = servers, urls, max_restarts
        self._given_up: set[str] = set()

    def restart_dead(self) -> None:
        """Restart servers that died. To be called every so often, by the process that started them.

        A server that died more than `max_restarts` times stays down. Raises `UserError` when none is left.
        """
        for server in self.servers:
            if server.alive or server.url in self._given_up:
                continue
            told = f"server {server.url} died"
            if server.restarts < self.max_restarts:
                dead = server.log
                server.restart()
                print(f"{told} (see {dead}); restart {server.restarts} of {self.max_restarts}", flush=True)
            else:
                self._given_up.add(server.url)
                self.check()
                print(f"{told} and stays down: it was restarted {server.restarts} times; see {server.log}", flush=True)

    def check(self) -> None:
        """Raise `UserError` naming the last server that died, with the end of its log, when none is left."""
        if not self.servers or any(server.alive for server in self.servers):
            return
        server = max(self.servers, key=lambda server: server.log.stat().st_mtime)
        again = f" and was restarted {server.restarts} times" if server.restarts else ""
        raise UserError(
            f"SGLang died{again}:\n{log_tail(server.log)}", where=f"server {server.url}", fix=f"see {server.log}"
        )

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Tend them from a thread, for a process that has other things to do; when none is left, that ends."""
        over = threading.Event()

        def watch() -> None:
            try:
                while not over.wait(_LOOK_EVERY_S):
                    self.restart_dead()
            except UserError as error:  # requests will fail and say which server it was
                print(error, file=sys.stderr, flush=True)

        thread = threading.Thread(target=watch, name="server-supervisor", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def stop(self) -> None:
        """Stop all of them, side by side."""
        for server in self.servers:
            server.ask_to_stop()
        for server in self.servers:
            server.stop()

    def __enter__(self) -> ServerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def launch_servers(recipe: Recipe, run_dir: str | Path, *, device: str | None = None) -> ServerGroup:
    """Start the servers a recipe asks for and wait until all answer; a group without processes when it gives URLs.

    Args:
        run_dir: logs go to `<run_dir>/servers/server_<n>.log`.
        device: "cuda" or "cpu"; None is `cluster.device`, where "auto" is what the servers' interpreter finds.

    Raises `UserError` for a flag that is refused, a port in use, an interpreter without SGLang, a server that dies
    (at once, with the end of its log) or is not ready within `startup_timeout`. Nothing is left running then.
    """
    config = recipe.policy.generation.sglang_cfg
    if config.urls:
        return ServerGroup([], [url.rstrip("/") for url in config.urls])
    recipe = hide_api_key(recipe)
    check_server_args(config.server_args)
    shape = ModelShape.from_folder(recipe.policy.model_name)
    shape.check_served_by_sglang(recipe.policy.model_name)
    ports = choose_ports(config.host, config.port, config.num_servers)
    python = config.python or sys.executable
    found = probe_environment(python, device or recipe.cluster.device)
    environment = build_environment(
        found,
        shape,
        base=dict(os.environ),
        threads=server_environment(recipe),
        tensor_parallel_size=config.tensor_parallel_size,
    )
    deadline = time.monotonic() + config.startup_timeout
    group = ServerGroup([], [], max_restarts=config.max_restarts)
    try:
        for index, port in enumerate(ports):
            flags = build_flags(recipe, shape, found, port=port, index=index)
            url = f"http://{config.host}:{port}"
            log = Path(run_dir) / "servers" / f"server_{index}.log"
            command = [python, "-m", "vespo_megatron.rollout_sglang.plugin.launch_sglang", *flags]
            group.servers.append(ServerProcess(url, command, environment, log))
            group.urls.append(url)
        for server in group.servers:
            server.wait_ready(deadline)
    except BaseException:
        group.stop()
        raise
    return group


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


def probe_environment(python: str, device: str) -> Environment:
    """Ask the servers' interpreter what it has; raises `UserError` when SGLang (or, on CPU, our plugin) is missing."""
    where = "policy.generation.sglang_cfg.python"
    try:
        answer = subprocess.run([python, "-c", _PROBE, device], capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise UserError(f"{python} cannot be run ({error.strerror})", where=where) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{python} gave no answer within 60 s", where=where) from error
    if answer.returncode != 0:
        raise UserError(f"{python} failed: {answer.stderr.strip()[-500:]}", where=where)
    found = json.loads(answer.stdout.strip().splitlines()[-1])
    if found["folder"] is None:
        raise UserError(
            f"{python} has no sglang",
            where=where,
            fix="install sglang there, or set policy.generation.backend=in_process",
        )
    if not found["plugin"]:
        raise UserError(
            f"{python} has sglang but not vespo_megatron's plugins for it",
            where=where,
            fix=f"{python} -m pip install --no-deps <this repository>",
        )
    return Environment(found["device"], Path(found["folder"]), found["torchvision"], found["plugin"])


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
