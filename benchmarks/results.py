"""Where benchmark scripts write what they measured: one section each of RESULTS.md, with the machine it ran on."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
HEADER = "# Measurements\n\nEvery section is written by its script in this folder, on the machine it names.\n"


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


def record(section: str, markdown: str, path: Path = RESULTS) -> None:
    """Write `markdown` as the section called `section`, replacing what it held; other sections stay as they are.

    Args:
        section: its heading, and its name between the markers.
        markdown: body; the machine and the date are added here.
    """
    begin, end = f"<!-- begin {section} -->", f"<!-- end {section} -->"
    stamp = f"{machine()}; load {os.getloadavg()[0]:.1f}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    block = f"{begin}\n## {section}\n\n{stamp}\n\n{markdown.strip()}\n{end}\n"
    text = path.read_text() if path.exists() else HEADER
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end) + r"\n?", re.DOTALL)
    text = pattern.sub(lambda _: block, text) if pattern.search(text) else f"{text.rstrip()}\n\n{block}"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
