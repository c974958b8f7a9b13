"""`vespo-megatron train` whose ranks fail as the recipe's run name says.

The launcher, its agent, megatron-core and the watchdog are the real ones. As the module the agent starts it is a worker
with one thing changed: at a given step and rank, in the forward of a micro-batch or before the gradients are added up.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAN = (3, 2)
"""(rank, step) of gradients that are not a number; the run goes on."""
FAULT = (5, 4)
"""(rank, step) of what ends the run."""


def fail(kind: str) -> None:
    if kind == "hang":
        ctypes.PyDLL(None).sleep(600)  # in C, and holding the interpreter's lock: no Python thread can run
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def worker(run_dir: Path, work: str) -> int:
    from vespo_megatron.launch import worker
    from vespo_megatron.megatron.own_gradients import OwnGradients
    from vespo_megatron.trainer.guard import Guard

    rank, kind = int(os.environ["RANK"]), run_dir.parent.name
    now = {"step": 0}
    begin, looking = Guard.begin, OwnGradients._looking

    def note_step(self: Guard, step: int) -> None:
        now["step"] = step
        begin(self, step)
        beat = self.policy.on_progress

        def forward() -> None:
            beat()
            if (rank, step) == FAULT:
                fail(kind)

        self.policy.on_progress = forward

    def spoil(self: OwnGradients, group: Any, start: Callable[..., None]) -> Callable[..., None]:
        look_and_start = looking(self, group, start)

        def spoil_and_start(*args: Any, **kwargs: Any) -> None:
            if (rank, now["step"]) == NAN:
                group.buckets[0].grad_data[0] = float("nan")
            look_and_start(*args, **kwargs)

        return spoil_and_start

    Guard.begin, OwnGradients._looking = note_step, spoil
    return worker.main(run_dir, work)


def train() -> int:
    from vespo_megatron import cli
    from vespo_megatron.launch import launcher

    launcher.WORKER_MODULE = "faulty_ranks"
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(worker(Path(sys.argv[1]), sys.argv[2]))
