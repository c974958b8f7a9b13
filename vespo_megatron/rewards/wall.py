"""What a program that a policy wrote is fenced by: bubblewrap, as this machine lets it.

Behind it a program is a user of its own with no capability, sees its own processes alone, a network that leads nowhere,
the interpreter read-only and two small folders in memory. docs/security.md says what that promises.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vespo_megatron.errors import UserError
from vespo_megatron.rewards.syscall_filter import filter_program

FOLDER = "/tmp"
"""The working folder of a program."""
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": FOLDER, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
"""All that a program has of one."""
_FOLDER_BYTES, _SHARED_BYTES = 64 << 20, 16 << 20
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib64", "/lib32")
_NEEDED_OF_ETC = ("/etc/ld.so.cache", "/etc/alternatives")
_FRESH_USERS = 2_000_000_000
"""Users from here on belong to nobody, where all are mapped."""
_DROP = ("--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs")
_TRY_S = 20.0


@dataclass(frozen=True)
class Wall:
    """One way to fence a program; `description` is for people."""

    description: str
    tool: str | None = None
    """bubblewrap's path; None: no wall at all."""
    becomes_fresh: bool = False
    """Whether this process is root, and the program is made another user."""
    mounts_as_root: bool = False
    """Whether the file system is laid out by root, before the program becomes that user."""

    def command(self, program: Sequence[str], files: Sequence[tuple[int, str]], filter_file: int) -> list[str]:
        """The command line that runs `program` behind the wall.

        Args:
            files: (file descriptor, path) of what the program finds there, read-only; closed by it.
            filter_file: file descriptor of `filter_program`.
        """
        if self.tool is None:
            return list(program)
        user = str(_fresh_user())
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", *_DROP] if self.becomes_fresh else []
        fence = [self.tool, *_ISOLATION, *_file_system(), *_shown(files), *_SEALED, "--seccomp", str(filter_file)]
        if self.mounts_as_root:
            needed = ("SETUID", "SETGID", "SETPCAP")
            return [*fence, *(word for name in needed for word in ("--cap-add", f"CAP_{name}")), *become, *program]
        return [*become, *fence, "--unshare-user", "--uid", user, "--gid", user, *program]


NONE = Wall("not fenced at all")
_ISOLATION = (
    "--unshare-pid",
    "--unshare-net",
    "--unshare-ipc",
    "--unshare-uts",
    "--unshare-cgroup-try",
    "--die-with-parent",
    "--new-session",
    "--clearenv",
    *(word for name, value in ENVIRONMENT.items() for word in ("--setenv", name, value)),
)
_SEALED = ("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", FOLDER)


@cache
def find_wall() -> Wall:
    """The best wall that this machine gives; tried, not guessed.

    Raises:
        UserError: none works; says why each did not.
    """
    filter_program()
    tool = shutil.which("bwrap")
    reasons = ["bwrap (package bubblewrap) was not found"] if tool is None else []
    for wall in _candidates(tool) if tool is not None else ():
        reason = _tried(wall)
        if reason is None:
            return wall
        reasons.append(f"{wall.description}: {reason}")
    raise UserError(
        f"nothing here fences what a policy writes ({'; '.join(reasons)})",
        where="env.reward code",
        expected="bubblewrap 0.8 or newer that may make namespaces",
        fix="install it, allow user namespaces, score elsewhere (env.reward=remote), or run what policies write with "
        "all that you may do: env.reward_kwargs.allow_unsafe_code=true",
    )


def _candidates(tool: str) -> list[Wall]:
    if os.getuid() != 0:
        return [Wall("bubblewrap in a user namespace", tool)]
    return [
        Wall("bubblewrap, as a user of its own", tool, becomes_fresh=True, mounts_as_root=True),
        Wall("bubblewrap in a user namespace, as a user of its own", tool, becomes_fresh=True),
    ]


def _tried(wall: Wall) -> str | None:
    """Why it does not work."""
    filter_file = memory_file(filter_program())
    try:
        command = wall.command([sys.executable, "-I", "-c", "print('fenced')"], [], filter_file)
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TRY_S, pass_fds=[filter_file])
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        os.close(filter_file)
    if done.returncode == 0 and done.stdout == "fenced\n":
        return None
    return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]


def memory_file(content: bytes) -> int:
    """A file descriptor that `content` is read from."""
    number = os.memfd_create("vespo", os.MFD_CLOEXEC)
    with open(number, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(number, 0, os.SEEK_SET)
    return number


def _fresh_user() -> int:
    """A user id that nothing else has; within what this user namespace maps."""
    first, _, count = max(
        (tuple(map(int, line.split())) for line in _lines("/proc/self/uid_map")), key=lambda row: row[2]
    )
    low = _FRESH_USERS if first + count > 2 * _FRESH_USERS else first + count // 2
    high = min(first + count - 2, low + _FRESH_USERS // 20)  # bubblewrap takes 31 bits
    return low + secrets.randbelow(max(1, high - low))


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


@cache
def _file_system() -> tuple[str, ...]:
    """The interpreter and its libraries, read-only; /proc, /dev and two folders of the program's own."""
    options = ["--ro-bind", "/usr", "/usr"]
    for path in _SYSTEM:
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            options += ["--ro-bind", path, path]
    for path in _NEEDED_OF_ETC:
        options += ["--ro-bind-try", path, path]
    options += ["--proc", "/proc", "--dev", "/dev"]
    for path, size in (("/dev/shm", _SHARED_BYTES), (FOLDER, _FOLDER_BYTES)):
        options += ["--size", str(size), "--perms", "1777", "--tmpfs", path]
    for place in _interpreter():  # last: it may be below a folder that was just made anew
        for parent in reversed(place.parents[:-1]):
            options += ["--dir", str(parent)]  # bubblewrap lets nobody else into those it makes by itself
        options += ["--ro-bind", str(place), str(place)]
    return tuple(options)


def _interpreter() -> list[Path]:
    """The folders that Python needs and /usr does not have, none within another."""
    folders = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parents[1]}
    found = sorted(folder for folder in folders if not folder.is_relative_to("/usr"))
    return [folder for folder in found if not any(folder.is_relative_to(other) for other in found if other != folder)]


def _shown(files: Sequence[tuple[int, str]]) -> list[str]:
    return [word for number, path in files for word in ("--perms", "0444", "--ro-bind-data", str(number), path)]
