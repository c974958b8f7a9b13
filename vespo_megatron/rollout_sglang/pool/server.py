"""One server of the pool: its state, its load, and the calls that wait for its answer."""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.faults import ServerFault


class ServerState(enum.Enum):
    """Whether a server gets requests, and why not; `membership` says what leads from one state to another."""

    SERVING = "serving"
    """It holds the current weights, checked. Only such a server gets requests."""
    FAULTY = "faulty"
    """It answers, but wrongly (an error status, a reply that breaks the contract, old weights, a deadline)."""
    GONE = "gone"
    """It cannot be reached, or its health check has failed for `health_timeout`."""
    JOINING = "joining"
    """It was faulty or gone, and takes part in a weight update."""


@dataclass(eq=False)
class PooledServer:
    """One server and what the pool knows of it; the pool's lock guards it."""

    number: int
    client: SGLangClient
    startup_time: object = None
    """As it says itself: another value is another process with other weights."""
    state: ServerState = ServerState.SERVING
    fault: ServerFault | None = None
    faults_in_a_row: int = 0
    in_flight: int = 0
    """Requests that it has been sent and not answered."""
    calls: set[asyncio.Future[Any]] = field(default_factory=set)
    """What waits for its answer, each in its own event loop."""

    @property
    def url(self) -> str:
        """As its client has it."""
        return self.client.url


def cancel_calls(calls: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel each in its own event loop; from any thread."""
    for call in calls:
        with contextlib.suppress(RuntimeError):  # that loop has ended, and its tasks with it
            call.get_loop().call_soon_threadsafe(call.cancel)
