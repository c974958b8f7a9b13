"""Work that stops in the middle to have the weights pushed, and then goes on where it was.

Only all trainer ranks together can push weights. Rank 0 may find in the middle of a rollout that servers need them (the
last one died, and one is back): everything it has drawn and scored so far stays in the thread that waits here, while
its caller leaves, pushes with the others, and comes back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vespo_megatron.rollout_sglang.faults import WeightsNeeded


class Interruptible:
    """One piece of work at a time, in a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self._work: Future[Any] | None = None
        self._changed = threading.Condition()
        self._need: WeightsNeeded | None = None

    def run(self, work: Callable[[], Any]) -> Any:
        """What `work` returns or raises. After `WeightsNeeded` call it again: the work that waits goes on instead.

        Raises:
            WeightsNeeded: the work waits for weights.
        """
        with self._changed:
            self._need = None
            self._changed.notify_all()
        running = self._work
        if running is None:
            running = self._work = self._thread.submit(work)
            running.add_done_callback(lambda _: self._tell())
        with self._changed:
            self._changed.wait_for(lambda: self._need is not None or running.done())
            if self._need is not None:
                raise self._need
        self._work = None
        return running.result()

    def await_weights(self, need: WeightsNeeded) -> None:
        """Called by the work, in any thread: `run` raises `need`, and this returns when `run` is called again."""
        with self._changed:
            self._need = need
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._need is None)

    def close(self) -> None:
        """Let waiting work go on to its end, whatever that is."""
        with self._changed:
            self._need = None
            self._changed.notify_all()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
