"""What a report says of where its numbers come from."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vespo_megatron.study.outcomes import Outcome


def machine() -> str:
    """Processor, cores, memory, GPU, Python and PyTorch, in one line; no host name."""
    import torch

    model = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = found.group(1).strip() if found else model
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):
        memory = float("nan")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    software = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    return f"{model}, {cores} cores, {memory:.0f} GiB{gpu}; {software}"


def facts(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Of the machine the report is written on, the installed packages, this code, and the runs' time."""
    found = {"machine": machine()}
    for package in ("megatron-core", "sglang", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    if commit.returncode == 0:
        found["commit"] = commit.stdout.strip()
    seconds = [outcome.seconds for outcome in outcomes if not math.isnan(outcome.seconds)]
    if seconds:
        found["time"] = f"{sum(seconds) / 3600:.1f} hours of runs, {sum(seconds) / len(seconds):.0f} s each"
    return found
