"""What a run listens on, and what another user of the machine can do with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from command_line import of_this_run, started
from listening_sockets import listening

from vespo_megatron.run.processes import wait_until
from vespo_megatron.run.rendezvous import FILE_VARIABLE

NOBODY = 65534


@pytest.mark.parallel
@pytest.mark.timeout(600)
def test_a_run_listens_on_the_loopback_alone_and_another_user_gets_nowhere(folder):
    metrics = folder / "runs" / "bad" / "version_0" / "metrics.jsonl"

    def steps() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    with started(folder) as run:
        assert wait_until(lambda: steps() or run.poll() is not None, 300)
        assert run.poll() is None, (folder / "err").read_text()
        processes = of_this_run(folder)
        found = listening(processes)
        assert found and {address for address, _ in found} == {"127.0.0.1"}, found
        if os.getuid() == 0:
            meeting = {process.environ().get(FILE_VARIABLE) for process in processes} - {None}
            assert len(meeting) == 1
            attack(meeting.pop(), [process.pid for process in processes], [port for _, port in found])
        before = steps()
        assert wait_until(lambda: steps() > before + 1 or run.poll() is not None, 120)
        assert run.poll() is None, (folder / "err").read_text()


def attack(meeting: str, pids: list[int], ports: list[int]) -> None:
    """As nobody: write where the ranks meet, read what they know, send a pickle to every port."""
    script = (
        "import pickle, socket, sys\n"
        "meeting, pids, ports = sys.argv[1], sys.argv[2].split(','), sys.argv[3].split(',')\n"
        "class Attack:\n    def __reduce__(self): return print, ('taken over',)\n"
        "for path, mode in [(meeting, 'ab'), (meeting, 'rb'), *((f'/proc/{pid}/environ', 'rb') for pid in pids)]:\n"
        "    try:\n        open(path, mode)\n        print(path, mode)\n    except OSError: pass\n"
        "for port in ports:\n"
        "    with socket.create_connection(('127.0.0.1', int(port)), 5) as connection:\n"
        "        connection.sendall(pickle.dumps(Attack()) * 100)\n"
    )
    python = next(path for path in ("/usr/bin/python3", sys.executable) if os.path.exists(path))
    numbers = [",".join(map(str, each)) for each in (pids, ports)]
    done = subprocess.run(
        [python, "-I", "-c", script, meeting, *numbers],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
