"""The watchdog: sees that a rank makes no progress, finds out which one is to blame, and ends the run.

It lives in another process than the ranks (the launcher), so that it runs whatever they hang in, and judges by its own
monotonic clock when their records (`run/heartbeat.py`) last changed, so that a clock that jumps does not matter.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.heartbeat import STACK_SIGNAL, RankStatus, heartbeat_folder, read_rank_statuses
from vespo_megatron.run.processes import TrainingFailed, wait_until
from vespo_megatron.run.stacks import NoStack, Whereabouts, whereabouts

EXIT_STALLED = 70
"""EX_SOFTWARE of sysexits.h: a rank hung and the watchdog ended the run."""
PATIENT_PHASES = ("set-up", "generate", "evaluate", "sync_weights")
"""Rank 0 waits for servers and rewards in these, which have deadlines of their own; the others wait for rank 0."""
_STACKS_WITHIN_S = 3.0
REPORT_FILE = "stall.txt"


class Stalled(TrainingFailed):
    """A rank made no progress for longer than it may; the message names it."""

    exit_code = EXIT_STALLED


class Watchdog:
    """`check()` raises `Stalled` when a rank has been silent for too long; call it often.

    Args:
        timeout: seconds without progress a rank may take; 0 watches nothing.
        patience: seconds more in `PATIENT_PHASES`.
    """

    def __init__(
        self, run_dir: Path, timeout: float, patience: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.run_dir, self.timeout, self.patience, self._clock = run_dir, timeout, patience, clock
        self._seen: dict[int, tuple[RankStatus, float]] = {}
        self._next_look = clock()

    @classmethod
    def from_recipe(cls, recipe: Recipe, run_dir: Path) -> Watchdog:
        """With the recipe's `cluster.watchdog_timeout`."""
        timeout = recipe.cluster.watchdog_timeout
        if timeout is None:
            timeout = 0.9 * recipe.policy.megatron_cfg.distributed_timeout
        # The group the others wait for rank 0 in is as patient (trainer/scatter.py).
        return cls(run_dir, timeout, 600.0 + 4 * recipe.policy.generation.sglang_cfg.request_timeout)

    def check(self) -> None:
        """Look at every rank, at most once a second. Raises `Stalled`."""
        now = self._clock()
        if not self.timeout or now < self._next_look:
            return
        self._next_look = now + min(1.0, self.timeout / 10)
        statuses = read_rank_statuses(self.run_dir)
        self._seen = {
            rank: self._seen[rank] if rank in self._seen and self._seen[rank][0] == status else (status, now)
            for rank, status in statuses.items()
        }
        if any(now - since > self._limit(status) for status, since in self._seen.values()):
            raise Stalled(self._report(now))

    def _limit(self, status: RankStatus) -> float:
        return self.timeout + (self.patience if status.phase in PATIENT_PHASES else 0.0)

    def _report(self, now: float) -> str:
        """Dump every rank's stacks and say who is to blame; also kept as `watchdog/stall.txt`."""
        statuses = {rank: status for rank, (status, _) in self._seen.items()}
        silent = {rank: now - since for rank, (_, since) in self._seen.items()}
        states = collect(self.run_dir, statuses)
        names = culprits(statuses, states)
        blamed = f"rank {', '.join(map(str, names))}" if names else "no single rank stands out; one of all"
        first = statuses[names[0]] if names else max(statuses.values(), key=lambda status: silent[status.rank])
        lines = [
            f"{blamed} hangs in phase {first.phase} of step {first.step}: "
            f"no progress for {silent[first.rank]:.0f} s (cluster.watchdog_timeout)"
        ]
        for rank, status in statuses.items():
            lines.append(f"  rank {rank}: step {status.step}, {status.phase}, {silent[rank]:.0f} s: {states[rank]}")
        lines.append(f"  stacks of every rank: {heartbeat_folder(self.run_dir)}")
        text = "\n".join(lines)
        with suppress(OSError):  # it is printed as well
            (heartbeat_folder(self.run_dir) / REPORT_FILE).write_text(text + "\n")
        return text


def collect(run_dir: Path, statuses: dict[int, RankStatus]) -> dict[int, Whereabouts | NoStack]:
    """What every rank is in, from fresh stacks of those on this machine."""
    here = socket.gethostname()
    files = {rank: heartbeat_folder(run_dir) / f"rank_{rank}.stacks.txt" for rank in statuses}
    before = {rank: _size(file) for rank, file in files.items()}
    asked = []
    for rank, status in statuses.items():
        if status.host == here:
            try:
                os.kill(status.pid, STACK_SIGNAL)
                asked.append(rank)
            except OSError:
                pass
    wait_until(lambda: all(_size(files[rank]) > before[rank] for rank in asked), _STACKS_WITHIN_S)
    time.sleep(0.1)  # the dumps that have begun end
    return {
        rank: _state(status, files[rank], before[rank]) if rank in asked else _absent(status, here)
        for rank, status in statuses.items()
    }


def culprits(statuses: dict[int, RankStatus], states: dict[int, Whereabouts | NoStack]) -> list[int]:
    """Who keeps the others waiting: who has no stack, else who is in no collective, else who is behind or elsewhere."""
    mute = [rank for rank, state in states.items() if isinstance(state, NoStack) and not state.elsewhere]
    if mute:
        return mute
    known = {rank: state for rank, state in states.items() if isinstance(state, Whereabouts)}
    outside = [rank for rank, state in known.items() if not state.collective]
    if outside:
        return outside
    behind = min(status.step for status in statuses.values())
    late = [rank for rank, status in statuses.items() if status.step == behind]
    if len(late) < len(statuses):
        return late
    calls: dict[object, list[int]] = {}
    for rank, state in known.items():
        calls.setdefault((state.collective, state.frame), []).append(rank)
    fewest = min(calls.values(), key=len, default=[])
    return fewest if len(calls) > 1 and 2 * len(fewest) < len(known) else []


def _state(status: RankStatus, stacks: Path, before: int) -> Whereabouts | NoStack:
    with stacks.open(errors="replace") as file:
        file.seek(before)
        state = whereabouts(file.read())
    return state if state.frame is not None else NoStack(f"left no stack ({_process_state(status.pid)})")


def _absent(status: RankStatus, here: str) -> NoStack:
    return NoStack("is gone") if status.host == here else NoStack(f"on another machine ({status.host})", elsewhere=True)


def _process_state(pid: int) -> str:
    try:
        code = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "the process is gone"
    return {"T": "the process is stopped", "D": "it waits for a device", "Z": "it has ended"}.get(code, f"state {code}")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


@contextmanager
def watched(recipe: Recipe, run_dir: Path) -> Iterator[None]:
    """Within the block a thread of this process (rank 0, where no launcher of ours runs) watches every rank.

    When one hangs this process ends with `EXIT_STALLED`, upon which torchrun ends the others on every node.
    """
    watchdog, ended = Watchdog.from_recipe(recipe, run_dir), threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            try:
                watchdog.check()
            except Stalled as stalled:
                print(f"vespo-megatron: {stalled}", file=sys.stderr, flush=True)
                os._exit(EXIT_STALLED)  # the main thread is in a collective, from which nothing returns

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)


def describe_death(run_dir: Path, rank: int, signum: int) -> str:
    """What to say of a rank that a signal ended."""
    status = read_rank_statuses(run_dir).get(rank)
    where = f" in phase {status.phase} of step {status.step}" if status else ""
    lines = [f"rank {rank} was ended by {signal.Signals(signum).name}{where}"]
    if signum == signal.SIGKILL:
        lines.append("  to do: see whether the kernel ran out of memory (dmesg), or the scheduler's limit was reached")
    return "\n".join(lines)
