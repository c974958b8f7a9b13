"""Rewards of a job on SLURM: one that takes its time, and one that tells where it runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


def score(data_source, solution_str, ground_truth, extra_info):
    """1 for every response, after 40 ms: the job is still in its steps when its limit comes, on any machine."""
    time.sleep(0.04)
    return 1.0


def tell(data_source, solution_str, ground_truth, extra_info):
    """1 for every response; the cores and the environment of the trainer's process go to $TOLD."""
    told = Path(os.environ["TOLD"])
    told.with_suffix(".part").write_text(json.dumps([sorted(os.sched_getaffinity(0)), dict(os.environ)]))
    told.with_suffix(".part").rename(told)
    return 1.0
