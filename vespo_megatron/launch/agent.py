"""The trainer processes of one machine: one per rank, ended together, and with whoever started them.

`python -m vespo_megatron.launch.agent LAUNCHER_PID RUN_DIR PROCESSES MODULE ARGUMENTS…` runs `python -m MODULE` as many
times, which meet in a file of their own. It stands where torchrun would, whose rendezvous listens on every address of
the machine and unpickles what anybody writes there (docs/security.md).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vespo_megatron.machine_errors import explained
from vespo_megatron.run.console import outlive_readers
from vespo_megatron.run.processes import EXIT_EXPLAINED, Stopped, die_with_parent, note_death, stop_on_signals
from vespo_megatron.run.rendezvous import FILE_VARIABLE

_GRACE_S = 30.0
"""The other ranks have so long to end after SIGTERM, once one has failed."""
_DEATH_S = 0.5
"""A rank that a signal ended is waited for so long after another's failure: it may be the cause."""
_POLL_S = 0.05


def main(launcher: int, run_dir: Path, processes: int, command: Sequence[str]) -> int:
    """Run the ranks of a run on one machine; 0 when each ended well, `EXIT_EXPLAINED` when one said why not, else 1."""
    die_with_parent(signal.SIGTERM, launcher)
    outlive_readers()
    with stop_on_signals(), tempfile.TemporaryDirectory(prefix="vespo-rendezvous-") as folder:
        try:
            meeting = {FILE_VARIABLE: os.path.join(folder, "store")}
            failed = run_ranks([meeting | rank_variables(rank, processes) for rank in range(processes)], command)
        except Stopped:
            return 1
        except OSError as error:
            if (said := explained(error)) is None:
                raise
            print(f"vespo-megatron: a rank could not be started: {said}", file=sys.stderr)
            return EXIT_EXPLAINED
        for rank, status in failed.items():
            if status < 0:
                note_death(run_dir, rank, -status)
                break
    return next((EXIT_EXPLAINED if status == EXIT_EXPLAINED else 1 for status in failed.values()), 0)


def rank_variables(local_rank: int, local_size: int, node: int = 0, nodes: int = 1) -> dict[str, str]:
    """What torchrun would tell a rank of its place; nodes have as many ranks each."""
    return {
        "RANK": str(node * local_size + local_rank),
        "WORLD_SIZE": str(nodes * local_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
    }


def run_ranks(ranks: Sequence[Mapping[str, str]], command: Sequence[str]) -> dict[int, int]:
    """Run `python -m command` once per entry of `ranks` (variables added to this environment) until all have ended.

    The first failure ends the rest. Whatever happens, none is left.

    Returns:
        local rank → status of those that failed first, by a signal (negative) before any other; empty if all went well.
    """
    agent = os.getpid()
    processes: list[subprocess.Popen] = []
    try:
        for variables in ranks:  # one by one: those that have started are ended if the next cannot be
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", *command],
                env=os.environ | variables,
                preexec_fn=lambda: die_with_parent(signal.SIGKILL, agent),
            )
            processes += [process]
        return _wait(processes)
    finally:
        _end(processes)


def _wait(processes: Sequence[subprocess.Popen]) -> dict[int, int]:
    while not (failed := _failed(processes)):
        if all(process.poll() is not None for process in processes):
            return {}
        time.sleep(_POLL_S)
    deadline = time.monotonic() + _DEATH_S
    while min(failed.values()) > 0 and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        failed = _failed(processes)
    return dict(sorted(failed.items(), key=lambda entry: entry[1] > 0))


def _failed(processes: Sequence[subprocess.Popen]) -> dict[int, int]:
    return {rank: status for rank, process in enumerate(processes) if (status := process.poll())}


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
