"""What a GPU did during a call, as PyTorch's profiler saw it: which kernels, for how long, and how long none."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Trace:
    """Kernels and copies of one call; seconds."""

    launches: int
    busy: float
    """At least one of them ran."""
    span: float
    """From the first one's begin to the last one's end."""
    by_name: dict[str, tuple[float, int]]
    """Seconds and launches, longest first."""

    @property
    def idle(self) -> float:
        """Between the first and the last, the GPU waited for the host."""
        return self.span - self.busy

    def table(self, rows: int = 25) -> str:
        """Markdown: the longest kernels."""
        lines = [
            f"{self.launches} kernels in {self.span * 1e3:.2f} ms, of which {self.idle * 1e3:.2f} ms "
            f"({self.idle / self.span:.1%}) none ran.",
            "",
            "| kernel | ms | share | launches |",
            "|---|---|---|---|",
        ]
        for name, (seconds, count) in list(self.by_name.items())[:rows]:
            lines.append(f"| `{short(name)}` | {seconds * 1e3:.2f} | {seconds / self.span:.1%} | {count} |")
        return "\n".join(lines)


def short(name: str, most: int = 90) -> str:
    """A kernel's name in a table."""
    name = (
        name.replace("|", "/").replace("void ", "").replace("at::native::", "").replace("(anonymous namespace)::", "")
    )
    return name if len(name) <= most else f"{name[: most - 30]}…{name[-29:]}"


def trace(run: Callable[[], object]) -> Trace:
    """Of one call on a GPU that has been called before."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            run()
            torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"no trace: {error}")
        return of_events([])
    return of_events(
        [
            (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        ]
    )


def of_events(events: list[tuple[str, float, float]]) -> Trace:
    """From (name, begin, end) in seconds."""
    events = sorted(events, key=lambda event: event[1])
    if not events:
        return Trace(0, math.nan, math.nan, {})
    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    busy, reached = 0.0, events[0][1]
    for name, begin, end in events:
        total[name] += end - begin
        count[name] += 1
        busy += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    order = sorted(total, key=lambda name: -total[name])
    return Trace(len(events), busy, reached - events[0][1], {name: (total[name], count[name]) for name in order})
