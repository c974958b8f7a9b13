"""A study's grid as SLURM jobs: one per run, and the report once all have ended."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from vespo_megatron.slurm.submit import write_jobs, write_report
from vespo_megatron.study.compare import unfinished
from vespo_megatron.study.spec import Study


def prepare_jobs(study: Study, *, study_file: str | Path | None = None, extra: Sequence[str] = ()) -> list[Path]:
    """SLURM scripts for every cell that has not finished, for `slurm.submit.submit`.

    Args:
        study_file: for a report after them; None: there is none.

    Raises:
        UserError: see `compare`.
    """
    folder = study.output / "slurm"
    jobs = {cell.name.replace("/", "_"): study.recipe(cell, tuple(extra)) for cell in unfinished(study, extra)}
    scripts = write_jobs(jobs, folder)
    if study_file is None:
        return scripts
    base = study.recipe(study.cells()[0], tuple(extra))
    seeds = ",".join(map(str, study.seeds))
    arguments = f"compare {shlex.quote(str(Path(study_file).resolve()))} --report-only --seeds {seeds}"
    return [*scripts, write_report(base, f"{study.name}_report", arguments, folder)]
