"""Rollout beside training: groups are sent as the staleness rule allows, drawn, scored, and wait for their turn.

Everything here runs in the controller's event loop, on rank 0; the trainer's thread asks for a batch and has weights
pushed in between. What runs while new weights arrive goes on under them (`on_weight_update`):

- `abort_and_continue`: the engine ends it with the tokens it has, and it is asked for again with them as its prompt.
  Each span keeps its version, and the log-probs and routes that it was drawn with.
- `in_place`: the engine holds still and goes on with its cache as it is. Log-probs and routes are those of the step
  that drew each token.
- `drain`: nothing new is sent, and the update waits for what runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from vespo_megatron.controller.staleness import Group, StalenessBuffer
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.sample import Sample
from vespo_megatron.rollout_sglang.faults import WeightsNeeded

Draw = Callable[[PromptRecord, str], Awaitable[list[Sample]]]
"""(prompt, label) → its scored samples; an empty list when the group is of no use."""


@dataclass
class Waits:
    """Seconds since the last look."""

    trainer: float = 0.0
    """It waited for a batch."""
    engine: float = 0.0
    """Nothing was under way."""


class RolloutStream:
    """See the module. Methods are coroutines of one event loop, but for the constructor.

    Args:
        buffer: what may be sent, and what waits.
        next_prompt: the next prompt of the data.
        draw: how a group is drawn and scored.
    """

    def __init__(self, buffer: StalenessBuffer, next_prompt: Callable[[], PromptRecord], draw: Draw) -> None:
        self.buffer, self._next_prompt, self._draw = buffer, next_prompt, draw
        self.waits = Waits()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._sending_stopped = False
        self.weights_needed: WeightsNeeded | None = None
        """Why what draws stands still until `resume_sending`; None while it does not."""
        self._failure: BaseException | None = None
        self._idle_since: float | None = time.monotonic()

    def resend(self, group: Group, record: PromptRecord) -> None:
        """Draw a group that a checkpoint knows as under way."""
        self._start(group, record)

    async def take(self) -> list[Group]:
        """The next batch; sends what may be sent meanwhile.

        Raises:
            WeightsNeeded: servers wait for weights; push them and call this again.
            UserError: drawing or scoring failed.
        """
        started = time.monotonic()
        try:
            while True:
                self._changed.clear()
                if self._failure is not None:
                    raise self._failure
                if self.weights_needed is not None:
                    raise self.weights_needed
                self._send()
                if self.buffer.ready():
                    batch = self.buffer.take()
                    self._send()  # into the room that they leave
                    return batch
                await self._changed.wait()
        finally:
            self.waits.trainer += time.monotonic() - started

    async def stop_sending(self, *, drain: bool) -> None:
        """Send nothing more; with `drain`, return when nothing is under way."""
        self._sending_stopped = True
        while drain and self._tasks and self.weights_needed is None and self._failure is None:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def resume_sending(self, version: int, *, between: bool = False) -> None:
        """The engine has the weights of `version`: send again. `between`: see `StalenessBuffer.new_version`."""
        self.buffer.new_version(version, between=between)
        self._sending_stopped, self.weights_needed = False, None
        self._send()
        self._changed.set()

    async def wait_for_weights(self, need: WeightsNeeded) -> None:
        """Called by what draws: returns when weights have come."""
        self.weights_needed = need
        self._changed.set()
        while self.weights_needed is not None:
            await asyncio.sleep(0.01)

    async def pop_waits(self) -> Waits:
        """Since the last call."""
        if self._idle_since is not None:
            now = time.monotonic()
            self.waits.engine += now - self._idle_since
            self._idle_since = now
        waits, self.waits = self.waits, Waits()
        return waits

    async def close(self) -> None:
        """Give up what is under way."""
        self._sending_stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _send(self) -> None:
        while not self._sending_stopped and self.buffer.room():
            record = self._next_prompt()
            self._start(self.buffer.admit(record.prompt_id), record)

    def _start(self, group: Group, record: PromptRecord) -> None:
        if self._idle_since is not None:
            self.waits.engine += time.monotonic() - self._idle_since
            self._idle_since = None
        task = asyncio.get_running_loop().create_task(self._run(group, record))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _run(self, group: Group, record: PromptRecord) -> None:
        samples = await self._draw(record, str(group.number))
        if samples:
            self.buffer.arrive(group, samples)
        else:
            self.buffer.abort(group)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._idle_since = time.monotonic()
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
        if self._failure is None:
            self._send()
        self._changed.set()
