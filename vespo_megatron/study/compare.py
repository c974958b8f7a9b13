"""`vespo-megatron compare STUDY`: run a study's grid, as many runs at a time as asked for, and write its report.

Each run is a process of its own, so one that fails takes no other down. Runs beside each other have cores of their own:
threads that wait for one another stand still while another run's hold the cores. Run again, the command goes on where
it was: finished runs stay, others resume from their newest checkpoint or begin.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.launch.launcher import ALONE, agent_environment
from vespo_megatron.launch.preflight import check_tables
from vespo_megatron.outputs import check_folder, written
from vespo_megatron.recipe.loader import load_recipe, save_recipe
from vespo_megatron.recipe.rules import validate
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.host_threads import core_shares
from vespo_megatron.run.processes import stop_on_signals
from vespo_megatron.run.records import SUMMARY_FILE
from vespo_megatron.run.run_directory import changed_keys
from vespo_megatron.study.run_process import CommandRun, RunForker, RunProcess, end, stop
from vespo_megatron.study.spec import Cell, Study

_POLL_S = 0.2
_GRACE_S = 60.0
"""A run that is asked to stop has so long to leave by itself."""


def compare(study: Study, *, extra: Sequence[str] = (), parallel: int | None = None) -> dict[Cell, str]:
    """Run every cell that has not finished. Returns those that failed, with the reason each gave.

    Raises:
        UserError: a cell's recipe is wrong, a finished run was of another recipe, or the study's output cannot be
            written; before anything is started.
        Stopped: a signal; the runs in progress were stopped, the same command goes on.
    """
    waiting = unfinished(study, extra)
    done = len(study.cells()) - len(waiting)
    print(f"{study.name}: {len(study.cells())} runs, {done} finished before", flush=True)
    return _run_all(study, waiting, parallel or study.parallel) if waiting else {}


def unfinished(study: Study, extra: Sequence[str] = ()) -> list[Cell]:
    """Cells without a finished run; each one's recipe is checked and written next to its future log.

    Raises:
        UserError: see `compare`.
    """
    waiting = []
    check_folder(study.output, f"{study.name}: output")
    for cell in study.cells():
        recipe, folder = study.recipe(cell, tuple(extra)), study.folder(cell)
        try:
            validate(recipe)
            check_tables(recipe)
        except UserError as error:
            where = f"{cell.name}: {error.where}".rstrip(": ")
            raise UserError(error.what, where=where, expected=error.expected, fix=error.fix) from None
        if (folder / SUMMARY_FILE).exists():
            if changes := changed_keys(folder, recipe):
                raise UserError(
                    "is finished with another recipe: " + "; ".join(changes[:3]),
                    where=str(folder),
                    fix="choose another `output:`, or remove the folder",
                )
            continue
        with written(folder.parent, f"{study.name}: output"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, recipe_file(study, cell))
        waiting.append(cell)
    return waiting


def recipe_file(study: Study, cell: Cell) -> Path:
    """The cell's resolved recipe, beside its run directory."""
    return study.folder(cell).with_suffix(".yaml")


def _run_all(study: Study, waiting: list[Cell], parallel: int) -> dict[Cell, str]:
    from tqdm import tqdm

    failed: dict[Cell, str] = {}
    running: dict[Cell, RunProcess] = {}
    free, held = core_shares(parallel), {}
    queue = list(waiting)
    starter = _Starter(study, cores=len(free[0]))
    bar = tqdm(total=len(waiting), desc=study.name, unit="run", dynamic_ncols=True)
    with bar, stop_on_signals(), _stopped_at_the_end(running):
        while queue or running:
            while queue and free:
                cell = queue.pop(0)
                running[cell], held[cell] = starter.start(cell), free.pop(0)
                with suppress(ProcessLookupError):  # it has ended already
                    os.sched_setaffinity(running[cell].pid, held[cell])
                _write(bar, f"begins {cell.name}")
            for cell, process in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[cell]
                free.append(held.pop(cell))
                bar.update()
                if status == 0:
                    _write(bar, f"ends   {cell.name}")
                else:
                    failed[cell] = _reason(study.folder(cell).with_suffix(".log"))
                    _write(bar, f"FAILED {cell.name} with status {status}: {failed[cell]}")
            time.sleep(_POLL_S)
    return failed


class _Starter:
    """Starts runs; those of one process and of one environment share what they import."""

    def __init__(self, study: Study, cores: int) -> None:
        self.study, self.cores = study, cores
        self.forker: RunForker | None = None

    def start(self, cell: Cell) -> RunProcess:
        file, log = recipe_file(self.study, cell), self.study.folder(cell).with_suffix(".log")
        recipe = load_recipe(file)
        variables = environment(recipe, self.cores)
        if recipe.world_size == 1:
            self.forker = self.forker or RunForker(variables)
            if self.forker.environment == variables:
                return self.forker.start(file, log)
        return CommandRun(file, log, variables)


def environment(recipe: Recipe, cores: int | None = None) -> dict[str, str]:
    """Of a run with so many cores; None: this process's. A run of one process needs no agent."""
    return agent_environment(recipe, os.environ, cores) | ALONE if recipe.world_size == 1 else dict(os.environ)


@contextmanager
def _stopped_at_the_end(running: dict[Cell, RunProcess]) -> Iterator[None]:
    """Whatever ends the block, no run is left: each is asked to stop, and it saves where its recipe says so."""
    try:
        yield
    finally:
        for process in running.values():
            stop(process)
        deadline = time.monotonic() + _GRACE_S
        for process in running.values():
            end(process, max(0.1, deadline - time.monotonic()))


def _write(bar: Any, text: str) -> None:
    bar.write(text, file=sys.stderr)


def _reason(log: Path) -> str:
    """Our own error where the log has one, else its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("vespo-megatron: ")]
    return (ours or lines or ["it said nothing"])[-1].removeprefix("vespo-megatron: ")[:300]
