"""Nothing that a run prints can end it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

TALKS = """
import sys
from vespo_megatron.run.console import outlive_readers
outlive_readers()
print("first", flush=True)
sys.stdin.readline()
for number in range(1000):
    print("a line", number)
    print("another", number, file=sys.stderr)
sys.stdout.flush()
print("\u03c6", flush=True)
sys.exit(7)
"""


def talking(**streams):
    return subprocess.Popen([sys.executable, "-c", TALKS], stdin=subprocess.PIPE, **streams)


@pytest.mark.parametrize("both", [True, False])
def test_a_reader_that_has_gone_is_not_missed(both):
    process = talking(stdout=subprocess.PIPE, stderr=subprocess.STDOUT if both else subprocess.DEVNULL)
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(60) == 7


def test_a_log_on_a_full_disk_loses_lines():
    with open("/dev/full", "wb") as full:
        process = talking(stdout=full, stderr=full)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 7


def test_a_terminal_that_was_closed_is_not_missed():
    ours, theirs = os.openpty()
    process = talking(stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert os.read(ours, 100) == b"first\r\n"
    os.close(ours)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 7


def test_who_reads_gets_all_of_it_in_order():
    process = talking(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(b"\n", timeout=60)
    assert out.decode().splitlines() == ["first", *(f"a line {n}" for n in range(1000)), "\u03c6"]
    assert err.decode().splitlines() == [f"another {n}" for n in range(1000)]
