"""A reward that takes its time, so that a job is still in its steps when its limit comes, however fast the machine."""

from __future__ import annotations

import time


def score(data_source, solution_str, ground_truth, extra_info):
    """1 for every response, after 40 ms."""
    time.sleep(0.04)
    return 1.0
