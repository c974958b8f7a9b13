"""`train --profile`: one step as a trace of operators on every rank, and as a flame graph of Python on rank 0."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from vespo_megatron.run.best_effort import BestEffort

FOLDER = "profile"


@contextlib.contextmanager
def profiled(run_dir: Path, rank: int, step: int) -> Iterator[None]:
    """Write `profile/step_<n>_rank_<r>.json.gz` (chrome://tracing, Perfetto) and `profile/step_<n>.html`.

    What cannot be written is told; the step is taken all the same.
    """
    from pyinstrument import Profiler

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    python = Profiler(interval=0.001) if rank == 0 else None
    with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as operators:
        if python is not None:
            python.start()
        try:
            yield
        finally:
            if python is not None:
                python.stop()
    with BestEffort(print).writing(f"{FOLDER}/"):
        folder = run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        operators.export_chrome_trace(str(folder / f"step_{step}_rank_{rank}.json.gz"))
        if python is not None:
            (folder / f"step_{step}.html").write_text(python.output_html(), encoding="utf-8")
