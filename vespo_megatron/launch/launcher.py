"""`vespo-megatron train` and `serve`: start what a recipe asks for, watch it, and leave nothing running.

Checks, run directory, SGLang servers, then one worker per process of `cluster`, all on this machine. Where somebody
else has started the ranks (RANK is set: torchrun, `slurm.node_agent`), this process is one of them and joins.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vespo_megatron.errors import UserError
from vespo_megatron.launch import preflight
from vespo_megatron.recipe.loader import load_recipe, save_recipe
from vespo_megatron.recipe.rules import validate
from vespo_megatron.recipe.scale_down import scale_down
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rollout_sglang.api_key import hide_api_key
from vespo_megatron.run.console import outlive_readers
from vespo_megatron.run.devices import allocator_variables, gpu_count, trainer_variables
from vespo_megatron.run.heartbeat import clear_heartbeats
from vespo_megatron.run.host_threads import trainer_environment
from vespo_megatron.run.network import LOOPBACK_VARIABLES, interface_variables, is_loopback
from vespo_megatron.run.processes import (
    EXIT_EXPLAINED,
    TrainingFailed,
    clear_failures,
    read_death,
    read_failure,
    stop_on_signals,
)
from vespo_megatron.run.run_directory import RECIPE_FILE, changed_keys, claimed, make_run_directory, said_ready
from vespo_megatron.run.stopping import StopKeeper, check_saved, clear_stop
from vespo_megatron.run.watchdog import Watchdog, describe_death, watched

WORKER_MODULE = "vespo_megatron.launch.worker"
ALONE = {"RANK": "0", "WORLD_SIZE": "1"}
"""What the only process of a run is told; one that is told this needs no agent."""
_AGENT_GRACE_S = 10.0
"""The agent has so long to end its workers after SIGTERM; then it is killed and the kernel ends them."""
_POLL_S = 0.2


def train(
    recipe_path: str | Path, overrides: Sequence[str] = (), *, work: str = "train", tiny_folder: str | None = None
) -> Path | None:
    """Run the recipe to its end. Returns the run directory (None on ranks other than 0 under torchrun).

    `work` is what the processes do once everything is up: 'train', 'mismatch' (measure and change nothing), or
    'mismatch-updates' (train on what was measured). With `tiny_folder` the recipe is scaled down to the tiny model
    there (`recipe.scale_down`).

    Raises:
        UserError: a mistake or fault that was explained, here, by a server or by a trainer process.
        TrainingFailed: any other failure of a trainer process; `watchdog.Stalled` when one hung.
        Stopped: SIGINT, SIGTERM, SIGHUP or SIGUSR1; with a checkpoint where there was time for one.

    Whatever is raised, all processes started here have ended.
    """
    recipe = hide_api_key(load_recipe(recipe_path, overrides))
    if tiny_folder is not None:
        recipe = scale_down(recipe, tiny_folder)
    outlive_readers()
    if "RANK" in os.environ:
        return join(recipe, work)
    if recipe.cluster.num_nodes > 1:
        raise UserError(
            f"is {recipe.cluster.num_nodes}; this command starts processes on this machine only",
            where="cluster.num_nodes",
            fix="start it with torchrun on every node: torchrun --nnodes … -m vespo_megatron.cli train …",
        )
    with stop_on_signals():
        preflight.check(recipe)
        run_dir = make_run_directory(recipe.exp_manager)
        print(f"run directory: {run_dir}", flush=True)
        with _attempt(recipe, run_dir) as (recipe, servers):
            with _agent(recipe, run_dir, work, servers.held) as agent, StopKeeper(recipe, run_dir) as stop:
                _watch(agent, (servers.restart_dead, Watchdog.from_recipe(recipe, run_dir).check, stop.check))
            if agent.returncode != 0:
                servers.check()  # that none is left is why the trainer failed
                raise _failure(run_dir, agent.returncode)
            stop.ended()
    return run_dir


def join(recipe: Recipe, work: str = "train") -> Path | None:
    """Be one of torchrun's workers. Rank 0 makes the run directory, and starts the servers when none are given."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != recipe.world_size:
        raise UserError(
            f"torchrun started {world} processes", where="cluster", expected=f"{recipe.world_size} as the recipe says"
        )
    if world > 1 and recipe.exp_manager.version is None:
        raise UserError(
            "has no value; under torchrun every process must know the run directory",
            where="exp_manager.version",
            fix="name it, for instance exp_manager.version=$SLURM_JOB_ID",
        )
    os.environ |= trainer_variables(recipe, os.environ, 0)  # hides GPUs from a trainer on the CPU, before it looks
    from vespo_megatron.launch import worker

    validate(recipe)
    if rank != 0:
        config = recipe.exp_manager
        worker.run(recipe, Path(config.exp_dir) / config.name / str(config.version), work)
        return None
    with stop_on_signals():
        preflight.check(recipe)
        run_dir = make_run_directory(recipe.exp_manager)
        with _attempt(recipe, run_dir) as (recipe, servers):
            with servers.supervised(), watched(recipe, run_dir):
                worker.run(recipe, run_dir, work)
            check_saved(run_dir)
    return run_dir


def serve(recipe_path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Start the recipe's SGLang servers and keep them until a signal. Raises as `train` does."""
    from vespo_megatron.rollout_sglang.server.server_group import launch_servers

    recipe = hide_api_key(load_recipe(recipe_path, overrides))
    validate(recipe)
    outlive_readers()
    with stop_on_signals():
        run_dir = make_run_directory(recipe.exp_manager)
        with launch_servers(recipe, run_dir) as servers, said_ready(run_dir, servers.urls):
            print(f"policy.generation.sglang_cfg.urls=[{','.join(servers.urls)}]", flush=True)
            while True:
                servers.restart_dead()
                time.sleep(_POLL_S)


# ---- the parts ---------------------------------------------------------------------------------------------------


class _NoServers:
    """Stands for servers where there are none to watch."""

    urls: list[str] = []  # noqa: RUF012
    held: tuple[int, ...] = ()

    def restart_dead(self) -> None:
        """Nothing can have died."""

    check = restart_dead

    def supervised(self) -> Any:
        """Nothing to watch."""
        return nullcontext()


@contextmanager
def _attempt(recipe: Recipe, run_dir: Path) -> Iterator[tuple[Recipe, Any]]:
    """The run directory for this process alone, without an earlier attempt's notes; the recipe as it is run; servers.

    The recipe is saved with what is known only now: where its servers are, and where weights are exchanged.
    """
    with claimed(run_dir):
        clear_failures(run_dir)
        clear_heartbeats(run_dir)
        clear_stop(run_dir)
        for change in changed_keys(run_dir, recipe):
            print(f"resuming with another {change}", flush=True)
        if recipe.policy.generation.backend == "sglang":
            folder = recipe.policy.generation.sglang_cfg.weight_folder or str(run_dir / "weights")
            recipe = recipe.with_values({"policy.generation.sglang_cfg.weight_folder": folder})
        with _servers(recipe, run_dir) as servers:
            recipe = recipe.with_values({"policy.generation.sglang_cfg.urls": servers.urls})
            save_recipe(recipe, run_dir / RECIPE_FILE)
            yield recipe, servers


def _servers(recipe: Recipe, run_dir: Path) -> Any:
    """A `ServerGroup` of the servers that are started; what stands for it with an in-process engine."""
    if recipe.policy.generation.backend != "sglang":
        return nullcontext(_NoServers())
    from vespo_megatron.rollout_sglang.server.server_group import launch_servers

    config = recipe.policy.generation.sglang_cfg
    if not config.urls:
        print(f"starting {config.num_servers} SGLang server(s), logs in {run_dir / 'servers'}", flush=True)
    return launch_servers(recipe, run_dir, beside_trainer=True)


@contextmanager
def _agent(recipe: Recipe, run_dir: Path, work: str, held: Sequence[int]) -> Iterator[subprocess.Popen]:
    """The agent and its workers, in a session of their own; ended when the block is left, however.

    It has `held`, the servers' ports, open as well: where this process is killed, nobody else gets them, and with them
    what workers that are still there send to their servers.
    """
    process = subprocess.Popen(
        agent_command(recipe, run_dir, work),
        env=agent_environment(recipe, os.environ),
        start_new_session=True,
        pass_fds=held,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_AGENT_GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(_AGENT_GRACE_S)


def agent_command(recipe: Recipe, run_dir: Path, work: str = "train") -> list[str]:
    """The command line of what runs the trainer processes of this run."""
    return [
        sys.executable,
        "-m",
        "vespo_megatron.launch.agent",
        str(os.getpid()),
        str(run_dir),
        str(recipe.cluster.gpus_per_node),
        WORKER_MODULE,
        str(run_dir),
        work,
    ]


def agent_environment(recipe: Recipe, base: os._Environ | dict[str, str], cores: int | None = None) -> dict[str, str]:
    """The workers' environment, of a run with so many cores (None: this process's); what the user has set stays."""
    environment = trainer_environment(recipe, cores) | base
    if "OMP_WAIT_POLICY" in base and "GOMP_SPINCOUNT" not in base:
        del environment["GOMP_SPINCOUNT"]  # it would have the last word
    hosts = [urlsplit(url).hostname or "" for url in recipe.policy.generation.sglang_cfg.urls]
    if all(map(is_loopback, hosts)) and (hosts or recipe.cluster.num_nodes == 1):
        environment = LOOPBACK_VARIABLES | environment
    environment |= interface_variables(recipe)
    if recipe.policy.generation.backend == "sglang":
        # SGLang's workers have both, and two ends of a communicator must agree on them (SkyRL #143).
        environment.setdefault("NCCL_CUMEM_ENABLE", "0")
        environment.setdefault("NCCL_NVLS_ENABLE", "0")
    # Megatron-core's overlap of communication and computation relies on the order of kernel launches.
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment |= allocator_variables(recipe, base)
    return environment | trainer_variables(recipe, base, gpu_count())


def _watch(agent: subprocess.Popen, checks: Sequence[Callable[[], None]]) -> None:
    """Wait for the agent; raises what one of `checks` raises: no server is left, a rank hangs, a stop took too long."""
    while agent.poll() is None:
        for check in checks:
            check()
        with suppress(subprocess.TimeoutExpired):
            agent.wait(_POLL_S)


def _failure(run_dir: Path, returncode: int) -> Exception:
    death = read_death(run_dir)
    if death is not None:  # the errors of the others come of it
        return TrainingFailed(describe_death(run_dir, *death))
    found = read_failure(run_dir)
    if found is None and returncode == EXIT_EXPLAINED:
        return UserError("a trainer process failed and could not note why; its message is above", where=str(run_dir))
    if found is None:
        return TrainingFailed(
            f"a trainer process ended without a word (the agent's status: {returncode}); see {run_dir}"
        )
    text, explained = found
    return UserError(text) if explained else TrainingFailed(text)
