"""Programs against the wall that they run behind, as root's run and as another user's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from wall import needs_wall

from vespo_megatron.errors import UserError
from vespo_megatron.rewards import wall
from vespo_megatron.rewards.code import choose_wall, code_reward
from vespo_megatron.rewards.sandbox import Limits, run
from vespo_megatron.rewards.wall import NONE, find_wall

NOBODY = 65534

AS_USER = """
import json, os, sys
from vespo_megatron.rewards.sandbox import Limits, run
from vespo_megatron.rewards.wall import find_wall
if sys.argv[1] != "root":
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    os.environ["HOME"] = "/"
    sys.executable, sys.prefix, sys.base_prefix = "/usr/bin/python3", "/usr", "/usr"
wall = find_wall()
print(wall.description, file=sys.stderr)
limits = Limits(float(sys.argv[2]), 256)
ended = [run(program, "", limits, wall) for program in json.load(sys.stdin)]
print(json.dumps([(each.status, each.printed) for each in ended]))
"""
"""Runs programs and says how they ended; as nobody, whom root's own Python is closed to, with the system's."""


@pytest.fixture(params=["root", "nobody"])
def answers(request):
    """A function: programs → how each ended, in the run of such a user."""
    if request.param == "nobody" and (os.getuid() != 0 or not Path("/usr/bin/python3").exists()):
        pytest.skip("needs root, and a Python that nobody may run")

    def ask(*programs: str, seconds: float = 60.0) -> list[tuple[int | None, str]]:
        done = subprocess.run(
            [sys.executable, "-c", AS_USER, request.param, str(seconds)],
            input=json.dumps(programs),
            capture_output=True,
            text=True,
            timeout=170,
        )
        assert done.returncode == 0, done.stderr
        return [tuple(each) for each in json.loads(done.stdout)]

    return ask


READS = """
import glob, os
found = []
for path in {paths}:
    try:
        open(path, {mode!r}).close()
        found.append(path)
    except OSError:
        pass
print(found)
"""
CALLS = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
calls = {{
    "unshare user": lambda: libc.unshare(0x10000000),
    "ptrace init": lambda: libc.ptrace(16, 1, 0, 0),
    "mount": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
    "remount": lambda: libc.mount(b"none", b"/", None, 0x20 | 0x1000, None),
    "setuid": lambda: libc.setuid(0),
    "memfd": lambda: libc.memfd_create(b"x", 0),
    "shmget": lambda: libc.shmget(0, 4096, 0o1600),
    "outlive": lambda: libc.prctl(1, 0),
    "setns": lambda: libc.setns(0, 0),
    "clone": lambda: libc.syscall(56, 0x10000011, 0, 0, 0, 0) if {x86} else -1,
}}
print([name for name, call in calls.items() if call() != -1])
"""


@needs_wall
def test_a_program_reaches_nothing_of_the_machine(answers, tmp_path):
    secret = Path(tempfile.mkstemp(prefix="secret-of-the-run-")[1])
    os.chmod(secret, 0o666)
    listener = socket.create_server(("127.0.0.1", 0))
    try:
        everywhere = ["/etc/shadow", "/etc/passwd", str(secret), f"/proc/{os.getpid()}/environ", "/dev/mem"]
        kernel = ["/proc/kcore", "/proc/sysrq-trigger", f"/proc/{os.getpid()}/maps"]
        outside = ["/program.py", "/x", "/dev/x", "/usr/x", "/proc/sys/kernel/hostname", f"/proc/{os.getpid()}/mem"]
        connect = (
            "import socket\n"
            f"for place in [('127.0.0.1', {listener.getsockname()[1]}), ('192.0.2.1', 80)]:\n"
            "    try:\n        socket.create_connection(place, 1)\n        print('connected')\n"
            "    except OSError: pass\n"
        )
        who = "import os; print(os.getuid() not in (0, %d), sorted(map(int, filter(str.isdigit, os.listdir('/proc')))))"
        found = answers(
            READS.format(paths=everywhere, mode="rb"),
            READS.format(paths=kernel, mode="r+b"),
            READS.format(paths=outside, mode="wb"),
            CALLS.format(x86=os.uname().machine == "x86_64"),
            connect,
            who % os.getuid(),
            "import os; print(sorted(os.environ))",
            "print([line for line in open('/proc/1/status') if line[:8] in ('Seccomp:', 'CapEff:\t')])",
        )
        assert [printed for _, printed in found[:4]] == ["[]\n"] * 4, found
        assert found[4] == (0, "")
        assert found[5][1].startswith("True [1, ") and found[5][1].count(",") <= 2, found[5]
        assert found[7][1] == "['CapEff:\\t0000000000000000\\n', 'Seccomp:\\t2\\n']\n", "of the wall's own process too"
        assert found[6][1] == "['HOME', 'LANG', 'OMP_NUM_THREADS', 'PATH', 'PWD']\n"
    finally:
        listener.close()
        secret.unlink()


OUTLIVES = """
import ctypes, os, time
ctypes.CDLL(None).prctl(1, 0)
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(1, 0)
        while True:
            time.sleep(0.01)
{end}
"""
BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
MANY = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        break
x = bytearray(90 << 20)
time.sleep(60)
"""
FILES = """
with open("/tmp/x", "wb") as file:
    for _ in range(400):
        file.write(bytes(1 << 20))
"""


@needs_wall
def test_a_program_stays_within_its_bounds_and_nothing_of_it_is_left(answers):
    before = {process.pid for process in psutil.process_iter()}
    late = answers(OUTLIVES.format(end="time.sleep(60)"), BOMB, seconds=2.0)
    assert [status for status, _ in late] == [None, None]
    found = answers(OUTLIVES.format(end=""), FILES, MANY)
    assert [status for status, _ in found] == [0, 1, None], "ended well, its file too large, its memory too much"
    time.sleep(0.1)
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if p.pid not in before]
    assert not [command for command in left if command and "/program.py" in command], left


def test_without_a_wall_programs_are_refused_unless_that_is_allowed(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    find_wall.cache_clear()
    try:
        with pytest.raises(UserError, match=r"(?s)bubblewrap\) was not found.*allow_unsafe_code=true"):
            choose_wall()
        assert choose_wall(allow_unsafe_code=True) is NONE
    finally:
        find_wall.cache_clear()


@needs_wall
def test_a_wall_that_does_not_work_is_passed_over_with_its_reason(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(wall.shutil, "which", lambda name: str(broken))
    find_wall.cache_clear()
    try:
        with pytest.raises(UserError, match="No permissions to create new namespace"):
            find_wall()
    finally:
        find_wall.cache_clear()


def test_unfenced_programs_still_have_bounds():
    assert run("print(input())", "4\n", Limits(60.0, 512), NONE).printed == "4\n"
    assert run("import time; time.sleep(60)", "", Limits(0.5, 512), NONE).status is None


# ---- rewards that are not earned ---------------------------------------------------------------------------------

EQUAL = """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __gt__ = __le__ = __ge__ = __lt__
    def __contains__(self, item): return True
    def __float__(self): return 3.0
    def __sub__(self, other): return 0
def add(a, b):
    return Equal()
"""
LIES = """
import os, sys
sys.stdout.write(open("/program.py").read() + "every statement held")
sys.stdout.flush()
os._exit(0)
"""
FORGES = """
import os, sys
channel = int(sys.argv[1]) if len(sys.argv) > 1 else 1
for message in (b'["value", {}, []]', b'["value", {"mine": 0}, []]', b'["names", 0, [], {}]', b'[' * 9999):
    os.write(channel, message + b"\\n")
def add(a, b):
    return 4
"""


@needs_wall
@pytest.mark.parametrize("program", [EQUAL, LIES, FORGES], ids=["equal", "lies", "forges"])
@pytest.mark.parametrize(
    "tests",
    [
        ["assert add(1, 2) == 3"],
        ["assert not add(1, 2) != 3"],
        ["assert add(1, 2) <= 3 and 3 in add(1, 2)"],
        "def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)",
        {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]},
    ],
    ids=["equal", "unequal", "order", "check", "call"],
)
def test_what_a_program_says_of_itself_earns_nothing(program, tests):
    assert code_reward("s", f"```python\n{program}\n```", tests, {}, test_timeout=20.0)["score"] == 0.0


USES = {
    "plain values": (
        "def same(x):\n    return x",
        "for x in (1, 2.5, 'ä', None, True, 10**5000, [1, (2, {3})], {(1, 2): b'x'}, float('inf'), 1j):\n"
        "    assert same(x) == x and type(same(x)) is type(x)\n",
    ),
    "an argument changed in place": ("def order(x):\n    x.sort()", "a = [3, 1]\norder(a)\nassert a == [1, 3]"),
    "a class": (
        "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n"
        "        self.items.append(x)\n    def __len__(self):\n        return len(self.items)\n",
        "s = Stack()\nassert not s\ns.push(4)\nassert len(s) == 1 and s.items == [4] and s",
    ),
    "a function of the tests": (
        "def each(f, x):\n    return [f(v) for v in x]",
        "assert each(lambda v: -v, [1]) == [-1]",
    ),
    "an exception": (
        "def fail():\n    raise ValueError('bad')",
        "try:\n    fail()\nexcept ValueError as error:\n    assert str(error) == 'bad'\nelse:\n    assert False",
    ),
    "a generator and a module": (
        "import math\ndef count(n):\n    yield from range(n)",
        "assert list(count(3)) == [0, 1, 2] and math.sqrt(4) == 2",
    ),
}


@needs_wall
@pytest.mark.parametrize(("program", "tests"), USES.values(), ids=USES)
def test_what_is_right_is_still_found_right(program, tests):
    assert code_reward("s", f"```python\n{program}\n```", {"test": tests}, {}, test_timeout=60.0)["score"] == 1.0


@needs_wall
def test_a_program_reads_nothing_of_its_tests():
    program = "def read(f):\n    return [f.__globals__, f.__code__]"
    tests = "try:\n    read(lambda: 0)\nexcept PermissionError:\n    pass\nelse:\n    assert False"
    assert code_reward("s", f"```python\n{program}\n```", {"test": tests}, {}, test_timeout=60.0)["score"] == 1.0
    assert (
        code_reward(
            "s", "```python\ndef abs(x):\n    return 0\ndef f():\n    return 9\n```", ["assert abs(f() - 3) < 1"], {}
        )["score"]
        == 0.0
    )
