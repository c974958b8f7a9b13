"""Supervisor of one command, of which nothing is left over: `python supervisor.py GRACE_SECONDS COMMAND…`, stdlib only.

The launching process starts it in a session of its own, so it leads a process group that everything the command
starts belongs to, and holds the other end of its standard input. When that end closes, because the launcher asks or
because it died in whatever way, or on SIGTERM, the command gets SIGTERM, and after the grace the whole group SIGKILL.
The command itself is killed if this process is.

Its temporary files are in a folder of their own that no other user can enter, and go with it, as does what SGLang and
Python leave in /dev/shm when they are killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

_PR_SET_PDEATHSIG = 1
_LONGEST_FOLDER = 60
"""SGLang makes sockets there, whose path may have 107 characters."""
_SHARED_EVERY_S = 10.0
_SHARED = re.compile(r"/dev/shm/(?:sglang_|sgl_|sem\.mp-)[^ \n]+")
"""SGLang 0.5.23's load snapshots and queues, Python's semaphores; not the trainer's buckets, which servers map too."""


def main(grace_s: float, command: list[str]) -> None:
    """Never returns: the group ends, this process with it, by `SIGKILL` (or by the command's own status)."""
    libc = ctypes.CDLL(None, use_errno=True)
    stop_read, stop_write = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda received, frame: None)
    os.set_blocking(stop_write, False)
    signal.set_wakeup_fd(stop_write, warn_on_full_buffer=False)
    folder = _own_folder()
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": folder},
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    launcher = os.getppid()
    shared: set[str] = set()
    looked = time.monotonic()
    # A forked child of the launcher may hold our input open: look for a change of parent as well.
    while child.poll() is None and os.getppid() == launcher:
        ready, _, _ = select.select([0, stop_read], [], [], 1.0)
        if 0 in ready and os.read(0, 4096) == b"":
            break
        if stop_read in ready and set(os.read(stop_read, 4096)) - {signal.SIGCHLD}:
            break
        if time.monotonic() > looked + _SHARED_EVERY_S:
            shared |= _shared_memory()
            looked = time.monotonic()
    shared |= _shared_memory()
    if child.poll() is None:
        child.terminate()
        deadline = time.monotonic() + grace_s
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    status = child.poll()
    print(f"[vespo-megatron] server ended with status {'killed' if status is None else status}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    for path in shared:
        with contextlib.suppress(OSError):
            os.unlink(path)
    os.killpg(0, signal.SIGKILL)


def _own_folder() -> str:
    folder = tempfile.mkdtemp(prefix="vespo-")
    if len(folder) <= _LONGEST_FOLDER:
        return folder
    os.rmdir(folder)
    return tempfile.mkdtemp(prefix="vespo-", dir="/tmp")


def _shared_memory() -> set[str]:
    """The files of /dev/shm that processes of this group have mapped, and leave behind."""
    found: set[str] = set()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if os.getpgid(int(name)) == os.getpgrp():
                with open(f"/proc/{name}/maps", errors="replace") as maps:
                    found.update(_SHARED.findall(maps.read()))
    return found


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
