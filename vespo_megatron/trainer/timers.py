"""Wall time of each phase of a step, in seconds, as `time/<phase>`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from vespo_megatron.trainer.pulse import Pulse


class Timers:
    """`with timers("generate"): …`, then `timers.pop()`. A pulse tells the watchdog which phase it is."""

    def __init__(self, pulse: Pulse | None = None) -> None:
        self._pulse = pulse
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        around = self._pulse.enter(phase) if self._pulse else ""
        try:
            yield
        finally:
            if self._pulse:
                self._pulse.enter(around)
            name = f"time/{phase}"
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def pop(self) -> dict[str, float]:
        """What was measured since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds
