"""Where a benchmark runs: on the GPU where there is one, on the host otherwise."""

from __future__ import annotations

import time
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def default_device() -> str:
    """`cuda` or `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def now(device: str) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def name(device: str) -> str:
    """For headings: a GPU's own name."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


class PeakMemory:
    """The most memory taken since it was made, above what was taken then: resident, or allocated on the GPU."""

    def __init__(self, device: str) -> None:
        self._device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
            self._before = _status("VmRSS")

    def extra(self) -> int:
        """Bytes."""
        peak = torch.cuda.max_memory_allocated() if self._device == "cuda" else _status("VmHWM")
        return peak - self._before


def _status(key: str) -> int:
    line = next(row for row in _STATUS.read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) * 1024
