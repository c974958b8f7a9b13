"""Wall time and memory of each phase of a step, as `time/<phase>` in seconds and `memory/<phase>` in GiB."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil
import torch

from vespo_megatron.metrics.merging import merge_rows
from vespo_megatron.run.heartbeat import Heartbeat


class Timers:
    """`with timers("generate"): …`, then `timers.pop()`. A pulse tells the watchdog which phase it is.

    Memory is this process's: on a GPU the most that was allocated during the phase, on the host what is resident at
    its end.
    """

    def __init__(self, heartbeat: Heartbeat | None = None, device: torch.device | None = None) -> None:
        self._heartbeat = heartbeat
        self._device = device if device is not None and device.type == "cuda" else None
        self._process = psutil.Process()
        self._measured: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        around = self._heartbeat.enter(phase) if self._heartbeat else ""
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
            if self._device is not None:
                torch.cuda.synchronize(self._device)  # or what a phase has asked for would count as the next one's
        finally:
            if self._heartbeat:
                self._heartbeat.enter(around)
            once = {f"time/{phase}": time.perf_counter() - started, f"memory/{phase}": self._memory() / 2**30}
            before = {name: self._measured[name] for name in once if name in self._measured}
            self._measured |= merge_rows([before, once])

    def seconds(self, phase: str) -> float:
        """Of a phase since the last `pop`."""
        return self._measured[f"time/{phase}"]

    def pop(self) -> dict[str, float]:
        """What was measured since the last call."""
        measured, self._measured = self._measured, {}
        return measured

    def _memory(self) -> int:
        if self._device is not None:
            return torch.cuda.max_memory_allocated(self._device)
        return self._process.memory_info().rss
