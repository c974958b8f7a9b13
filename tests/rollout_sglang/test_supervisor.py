"""What a server leaves behind, in whatever way it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vespo_megatron.rollout_sglang.server import supervisor

SERVER = """
import mmap, os, sys, tempfile, time
shared = open(sys.argv[1], "w+b")
shared.write(bytes(4096))
shared.flush()
held = mmap.mmap(shared.fileno(), 4096)
file = tempfile.NamedTemporaryFile(delete=False)
print(file.name, oct(os.stat(os.path.dirname(file.name)).st_mode & 0o777), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("ends", ["launcher closes its input", "SIGTERM"])
def test_a_server_leaves_nothing_in_shared_memory_or_temporary_folders(ends):
    shared = Path(f"/dev/shm/sglang_test_{os.getpid()}.shm")
    command = [sys.executable, "-I", "-S", supervisor.__file__, "0.1", sys.executable, "-c", SERVER, str(shared)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        name, mode = run.stdout.readline().split()
        assert shared.exists() and Path(name).exists() and mode == "0o700"
        if ends == "SIGTERM":
            run.send_signal(signal.SIGTERM)
        else:
            run.stdin.close()
        run.wait(60)
    assert not shared.exists() and not Path(name).parent.exists()
