"""A whole run in one process that is quick to start: forked from a process that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from vespo_megatron.recipe.loader import load_recipe, save_recipe
from vespo_megatron.run.heartbeat import read_rank_statuses
from vespo_megatron.run.run_directory import RECIPE_FILE

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["vespo_megatron.launch.preload"])

_PATIENCE_S = 600
"""A run takes seconds, and minutes where much else runs beside it."""
ONE_PROCESS = (
    "policy.megatron_cfg.tensor_model_parallel_size=1",
    "policy.megatron_cfg.sequence_parallel=false",
    "policy.megatron_cfg.expert_model_parallel_size=1",
    "cluster.gpus_per_node=1",
    "logger.tensorboard_enabled=false",
    "exp_manager.resume_if_exists=true",
    "env.reward=rewards_of_mine:spread",
)


def make_run(folder: Path, name: str, *overrides: str) -> Path:
    """The run directory of a run in one process, of the recipe in `folder`."""
    recipe = load_recipe(folder / "recipe.yaml", [*ONE_PROCESS, *overrides])
    run_dir = folder / "runs" / name
    run_dir.mkdir(parents=True)
    save_recipe(recipe, run_dir / RECIPE_FILE)
    return run_dir


def finish(run_dir: Path, before: Callable[[str], None] | None = None) -> None:
    """Run it to its end, which must be a good one."""
    process = start(run_dir, before)
    process.join(_PATIENCE_S)
    process.kill()
    assert process.exitcode == 0, [path.read_text() for path in (run_dir / "errors").glob("*")]


def start(run_dir: Path, before: Callable[[str], None] | None = None) -> multiprocessing.Process:
    """The worker of the run in `run_dir`, whose recipe is there; `before` is called in it first, with the folder."""
    process = _fork.Process(target=_train, args=(str(run_dir), before))
    process.start()
    return process


def _train(run_dir: str, before: Callable[[str], None] | None) -> None:
    import torch

    from vespo_megatron.launch import worker

    if before is not None:
        before(run_dir)
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os._exit(worker.main(Path(run_dir)))


def wait_for_step(run_dir: Path, process: multiprocessing.Process, step: int) -> None:
    """Return when the run says that it is in this step or a later one."""
    deadline = time.monotonic() + _PATIENCE_S
    while process.is_alive() and time.monotonic() < deadline:
        status = read_rank_statuses(run_dir).get(0)
        if status is not None and status.step >= step:
            return
        time.sleep(0.001)
    process.kill()
    raise AssertionError(f"step {step} was not reached")


def kill_in(run_dir: Path, process: multiprocessing.Process, phase: str, step: int, chance: random.Random) -> str:
    """SIGKILL at a random moment of `phase` in `step` or later; '' when the run has ended before.

    `checkpoint write` is the thread beside training: while the folder has its provisional name.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while process.is_alive() and time.monotonic() < deadline:
        status = read_rank_statuses(run_dir).get(0)
        if status is not None and status.step >= step and _is_in(run_dir, status.phase, phase):
            time.sleep(chance.uniform(0.0, 0.08))
            where = read_rank_statuses(run_dir).get(0)
            os.kill(process.pid, signal.SIGKILL)
            process.join(10)
            return f"{where.phase} of step {where.step}" if where else ""
        time.sleep(0.0005)
    process.join(10)
    process.kill()  # whoever starts it again is the only one
    process.join(10)
    return ""


def _is_in(run_dir: Path, now: str, wanted: str) -> bool:
    if wanted == "checkpoint write":
        return any((run_dir / "checkpoints").glob("*.partial"))
    return now == wanted
