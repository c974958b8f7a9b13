"""The SGLang servers of one run: start them, restart those that die, stop them; logs are in the run directory."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rollout_sglang.api_key import hide_api_key
from vespo_megatron.rollout_sglang.server.cuda_stack import check_exchange
from vespo_megatron.rollout_sglang.server.environment import Environment, build_environment, probe_environment
from vespo_megatron.rollout_sglang.server.flags import build_flags, check_served, check_server_args, first_gpu
from vespo_megatron.rollout_sglang.server.ports import give_up, hold_ports
from vespo_megatron.rollout_sglang.server.server_process import ServerProcess, log_tail
from vespo_megatron.rollout_sglang.start_lock import StartLock
from vespo_megatron.run.devices import split, visible_gpus
from vespo_megatron.run.host_threads import server_environment
from vespo_megatron.run.network import LOOPBACK_VARIABLES, interface_variables, is_loopback

_LOOK_EVERY_S = 0.5


class ServerGroup:
    """The servers of one run; a context manager that stops them.

    Args:
        urls: of servers started here, or elsewhere.
        max_restarts: of each server.
        start_lock: is held while servers start again; they wait while another has it, a trainer on their devices.
        start_timeout_s: a server that starts again and is not ready within so many seconds is ended.
    """

    def __init__(
        self,
        servers: list[ServerProcess],
        urls: list[str],
        *,
        max_restarts: int = 0,
        start_lock: StartLock | None = None,
        start_timeout_s: float = 300.0,
    ) -> None:
        self.servers, self.urls, self.max_restarts = servers, urls, max_restarts
        self._start_lock, self._start_timeout_s = start_lock, start_timeout_s
        self._starting: dict[ServerProcess, float] = {}
        """Servers for which the lock is held, and until when."""
        self._waiting: set[str] = set()
        self._given_up: list[str] = []
        """In the order in which they were seen dead."""

    @property
    def held(self) -> Sequence[int]:
        """Open files that hold the ports of servers started here."""
        return [server.port.handle for server in self.servers]

    def restart_dead(self) -> None:
        """Restart servers that died. To be called every so often, by the process that started them.

        A server that died more than `max_restarts` times stays down. Raises `UserError` when none is left.
        """
        if self._look_after_starts():
            return
        for server in self.servers:
            if server.alive or server.url in self._given_up:
                continue
            told = f"server {server.url} died"
            if server.restarts < self.max_restarts:
                if not self._may_start(server):
                    continue
                dead = server.log
                server.restart()
                print(f"{told} (see {dead}); restart {server.restarts} of {self.max_restarts}", flush=True)
            else:
                self._given_up.append(server.url)
                self.check()
                print(f"{told} and stays down: it was restarted {server.restarts} times; see {server.log}", flush=True)

    def _may_start(self, server: ServerProcess) -> bool:
        if self._start_lock is None:
            return True
        if not self._start_lock.try_acquire():
            if server.url not in self._waiting:
                print(f"server {server.url} died; it starts again when the trainer leaves its devices", flush=True)
            self._waiting.add(server.url)
            return False
        self._waiting.discard(server.url)
        self._starting[server] = time.monotonic() + self._start_timeout_s
        return True

    def _look_after_starts(self) -> bool:
        """Give the lock back when every server that was started again is ready, or has ended; whether that was now.

        A trainer that waits for it has it then before the next attempt.
        """
        if not self._starting:
            return False
        for server, deadline in list(self._starting.items()):
            if server.alive and time.monotonic() > deadline:
                print(f"server {server.url} was not ready within {self._start_timeout_s:g} s and is ended", flush=True)
                server.end()
            if not server.alive or server.answers():
                del self._starting[server]
        if self._starting:
            return False
        if self._start_lock is not None:
            self._start_lock.release()
        return True

    def check(self) -> None:
        """Raise `UserError` naming the last server that died, with the end of its log, when none is left."""
        if not self.servers or any(server.alive for server in self.servers):
            return
        last = self._given_up[-1] if self._given_up else ""
        server = max(self.servers, key=lambda server: (server.url == last, server.log.stat().st_mtime))
        again = f" and was restarted {server.restarts} times" if server.restarts else ""
        raise UserError(
            f"SGLang died{again}:\n{log_tail(server.log)}", where=f"server {server.url}", fix=f"see {server.log}"
        )

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Restart servers that die, from a thread, while the process does other things; that ends when none is left."""
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
        if self._start_lock is not None:
            self._start_lock.release()

    def __enter__(self) -> ServerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def launch_servers(
    recipe: Recipe, run_dir: str | Path, *, device: str | None = None, beside_trainer: bool = False
) -> ServerGroup:
    """Start the servers a recipe asks for and wait until all answer; a group without processes when it gives URLs.

    Args:
        run_dir: logs go to `<run_dir>/servers/server_<n>.log`.
        device: "cuda" or "cpu"; None is `cluster.device`, where "auto" is what the servers' interpreter finds.
        beside_trainer: whether the trainer's processes are on this node too, and have its first GPUs.

    Raises `UserError` for a flag that is refused, too few GPUs, a port in use, an interpreter without SGLang, a server
    that dies (at once, with the end of its log) or is not ready within `startup_timeout`. Nothing is left running then.
    """
    config = recipe.policy.generation.sglang_cfg
    if config.urls:
        return ServerGroup([], [url.rstrip("/") for url in config.urls])
    recipe = hide_api_key(recipe)
    check_server_args(config.server_args)
    shape = read_shape(recipe.policy.model_name)
    check_served(shape, recipe.policy.model_name)
    ports = hold_ports(config.host, config.port, config.num_servers)
    try:
        python = config.python or sys.executable
        found = probe_environment(python, device or recipe.cluster.device)
        if found.device == "cuda":
            check_exchange(python, sys.executable, config.weight_transport)
        gpus = _gpus(recipe, found, beside_trainer)
    except BaseException:
        give_up(ports)
        raise
    deadline = time.monotonic() + config.startup_timeout
    group = ServerGroup(
        [],
        [port.url for port in ports],
        # Who starts servers elsewhere does not know when the trainer is away from their devices.
        max_restarts=config.max_restarts if beside_trainer or not config.colocated else 0,
        start_lock=StartLock(run_dir) if config.colocated else None,
        start_timeout_s=config.startup_timeout,
    )
    try:
        for index, port in enumerate(ports):
            flags = build_flags(recipe, shape, found, host=port.address, port=port.number, index=index)
            log = Path(run_dir) / "servers" / f"server_{index}.log"
            environment = build_environment(
                found,
                shape,
                base=(LOOPBACK_VARIABLES if is_loopback(port.address) else {})
                | dict(os.environ)
                | interface_variables(recipe),
                threads=server_environment(recipe),
                tensor_parallel_size=config.tensor_parallel_size,
                gpus=gpus[index],
                gives_memory_back=config.colocated,
            )
            command = [python, "-m", "vespo_megatron.rollout_sglang.plugin.launch_sglang", *flags]
            group.servers.append(ServerProcess(port, command, environment, log))
        for server in group.servers:
            server.wait_ready(deadline)
    except BaseException:
        group.stop()
        give_up(ports)
        raise
    return group


def _gpus(recipe: Recipe, found: Environment, beside_trainer: bool) -> Sequence[Sequence[str] | None]:
    """The names of each server's GPUs; None for servers on the CPU, and where the recipe places them itself."""
    config = recipe.policy.generation.sglang_cfg
    if found.device == "cpu" or first_gpu(config, 0) is not None:
        return [None] * config.num_servers
    handed_out = split(recipe, visible_gpus(os.environ, found.num_gpus), with_trainer=beside_trainer)
    print(f"GPUs of this node: {handed_out}", flush=True)
    return handed_out.servers
