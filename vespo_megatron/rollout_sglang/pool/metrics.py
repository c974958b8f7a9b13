"""What the servers did since the last step: `rollout/…`, and `rollout/server_<n>/…` where there are several.

| metric | meaning |
|---|---|
| `queue_max`, `queue_mean` | requests that waited for a server: most at one time; over all requests dispatched |
| `in_flight_max` | requests that servers had at one time, at most |
| `latency_p50`, `_p95`, `_p99` | seconds from a call's dispatch to its answer, retries included, per request |
| `tokens_per_second` | response tokens over the time in which anything was in flight |
| `retries` | calls repeated to the same server because it had not taken them on |
| `redispatched` | requests sent to another server because the first one failed |
| `faults` | servers taken out of service |
| `readmitted` | servers taken back after a weight update |
| `servers` | servers in service now |
| `server_<n>/requests`, `/tokens_per_second`, `/latency_p95`, `/in_flight_max`, `/faults` | the same of one server |
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class ServerCounts:
    """One server (or all of them) since the last `pop`."""

    in_flight: int = 0
    in_flight_max: int = 0
    requests: int = 0
    tokens: int = 0
    faults: int = 0
    latencies: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, requests) of every answered call."""
    _busy_s: float = 0.0
    _busy_since: float = field(default_factory=time.monotonic)

    def load_changed(self, change: int) -> None:
        """`change` more requests are in flight."""
        if self.in_flight == 0:
            self._busy_since = time.monotonic()
        self.in_flight += change
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        if self.in_flight == 0:
            self._busy_s += time.monotonic() - self._busy_since

    @property
    def busy_s(self) -> float:
        """Seconds in which anything was in flight."""
        return self._busy_s + (time.monotonic() - self._busy_since if self.in_flight else 0.0)

    def successor(self) -> ServerCounts:
        """Empty counts that go on with what is in flight."""
        return ServerCounts(in_flight=self.in_flight, in_flight_max=self.in_flight)


class RolloutMetrics:
    """Counts, one entry of `servers` per server of the pool. The pool's lock guards it."""

    def __init__(self, num_servers: int) -> None:
        self.servers = [ServerCounts() for _ in range(num_servers)]
        self._together = ServerCounts()
        self.queued = 0
        self._clear()

    def _clear(self) -> None:
        self.retries = self.redispatched = self.readmitted = self._queue_sum = self._dispatched = 0
        self.queue_max = self.queued

    def waits(self, change: int) -> None:
        """`change` more requests wait for a server."""
        self.queued += change
        self.queue_max = max(self.queue_max, self.queued)

    def load_changed(self, server: int, change: int) -> None:
        """`change` more requests are in flight at a server."""
        self.servers[server].load_changed(change)
        self._together.load_changed(change)
        if change > 0:
            self._dispatched += change
            self._queue_sum += change * self.queued

    def answered(self, server: int, requests: int, tokens: int, seconds: float) -> None:
        """A call came back whole."""
        counts = self.servers[server]
        counts.requests += requests
        counts.tokens += tokens
        counts.latencies.append((seconds, requests))

    def pop(self, servers_in_service: int) -> dict[str, float]:
        """All of it by metric name, and start anew."""
        every = self.servers
        latencies = [entry for counts in every for entry in counts.latencies]
        result = {
            "rollout/queue_max": float(self.queue_max),
            "rollout/in_flight_max": float(self._together.in_flight_max),
            "rollout/queue_mean": self._queue_sum / max(1, self._dispatched),
            "rollout/tokens_per_second": _rate(sum(counts.tokens for counts in every), self._together.busy_s),
            "rollout/retries": float(self.retries),
            "rollout/redispatched": float(self.redispatched),
            "rollout/faults": float(sum(counts.faults for counts in every)),
            "rollout/readmitted": float(self.readmitted),
            "rollout/servers": float(servers_in_service),
        }
        points = (50, 95, 99)
        for point, seconds in zip(points, _percentiles(latencies, points), strict=True):
            result[f"rollout/latency_p{point}"] = seconds
        if len(every) > 1:
            for number, counts in enumerate(every):
                result |= {
                    f"rollout/server_{number}/requests": float(counts.requests),
                    f"rollout/server_{number}/tokens_per_second": _rate(counts.tokens, counts.busy_s),
                    f"rollout/server_{number}/latency_p95": _percentiles(counts.latencies, (95,))[0],
                    f"rollout/server_{number}/in_flight_max": float(counts.in_flight_max),
                    f"rollout/server_{number}/faults": float(counts.faults),
                }
        self.servers = [counts.successor() for counts in every]
        self._together = self._together.successor()
        self._clear()
        return result


def _rate(amount: int, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def _percentiles(latencies: Iterable[tuple[float, int]], which: tuple[int, ...]) -> list[float]:
    """Of seconds, each counted as often as its call has requests; 0 where there is none."""
    entries = sorted(latencies)
    if not entries:
        return [0.0] * len(which)
    seconds = np.repeat([entry[0] for entry in entries], [entry[1] for entry in entries])
    return [float(value) for value in np.percentile(seconds, which)]
