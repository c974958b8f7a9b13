"""Where a benchmark runs: on the GPU where there is one, on the host otherwise; how long things take there at least."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
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


def bits(device: str) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a host."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def median_seconds(device: str, run: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
    """Of one call: each of `repeats` waited for, `warm` of them before that not counted."""
    for _ in range(warm):
        run()
    took = []
    for _ in range(repeats):
        started = now(device)
        run()
        took.append(now(device) - started)
    return statistics.median(took)


def event_seconds(run: Callable[[], object], repeats: int = 20, warm: int = 3) -> float:
    """Of one call on a GPU, between events on it, calls queued behind each other: what launching costs is hidden."""
    for _ in range(warm):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3


@dataclass(frozen=True)
class Ceilings:
    """What this device was seen to reach, in this process."""

    copy: float
    """Bytes a second, read and written, of a copy on the device."""
    matmul: float
    """Floating-point operations a second of a square product of random numbers."""

    def floor(self, *, nbytes: float = 0.0, flops: float = 0.0) -> float:
        """Seconds that anything takes at least which moves this many bytes and does this many operations."""
        return max(nbytes / self.copy, flops / self.matmul)

    def __str__(self) -> str:
        return f"Ceilings measured here: copy {self.copy / 1e12:.3g} TB/s, product {self.matmul / 1e12:.4g} TFLOP/s."


@cache
def ceilings(device: str) -> Ceilings:
    """On a GPU: a copy of 4 GiB, bfloat16 8192³. On a host: 64 MiB, float32 1024³."""
    found = _ceilings(device)
    release(device)
    return found


def _ceilings(device: str) -> Ceilings:
    large = device == "cuda"
    numbers, size = (1 << 30, 8192) if large else (1 << 24, 1024)
    source = torch.empty(numbers, device=device).uniform_()
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device, dtype=bits(device)) for _ in range(2))
    out = torch.empty_like(left)
    time_of = event_seconds if large else lambda run: median_seconds(device, run, 5, 1)
    return Ceilings(
        2 * source.nbytes / time_of(lambda: target.copy_(source)),
        2 * size**3 / time_of(lambda: torch.mm(left, right, out=out)),
    )


def release(device: str) -> None:
    """Give cached memory back."""
    if device == "cuda":
        torch.cuda.empty_cache()


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
