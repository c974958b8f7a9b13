"""Supervisor of one command, of which nothing is left over: `python supervisor.py GRACE_SECONDS COMMAND…`, stdlib only.

The launching process starts it in a session of its own, so it leads a process group that everything the command
starts belongs to, and holds the other end of its standard input. When that end closes, because the launcher asks or
because it died in whatever way, or on SIGTERM, the command gets SIGTERM, and after the grace the whole group SIGKILL.
The command itself is killed if this process is.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG = 1


def main(grace_s: float, command: list[str]) -> None:
    """Never returns: the group ends, this process with it, by `SIGKILL` (or by the command's own status)."""
    libc = ctypes.CDLL(None, use_errno=True)
    stop_read, stop_write = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda received, frame: None)
    os.set_blocking(stop_write, False)
    signal.set_wakeup_fd(stop_write, warn_on_full_buffer=False)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    launcher = os.getppid()
    # A forked child of the launcher may hold our input open: look for a change of parent as well.
    while child.poll() is None and os.getppid() == launcher:
        ready, _, _ = select.select([0, stop_read], [], [], 1.0)
        if 0 in ready and os.read(0, 4096) == b"":
            break
        if stop_read in ready and set(os.read(stop_read, 4096)) - {signal.SIGCHLD}:
            break
    if child.poll() is None:
        child.terminate()
        deadline = time.monotonic() + grace_s
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    status = child.poll()
    print(f"[vespo-megatron] server ended with status {'killed' if status is None else status}", flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
