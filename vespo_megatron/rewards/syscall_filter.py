"""What a fenced program may not ask of the kernel, as a seccomp filter (classic BPF) that bubblewrap installs.

Refused is what reaches other processes, makes namespaces or memory that no process is charged for, and interfaces that
no program of a response needs but kernel exploits do. Numbers: arch/x86/entry/syscalls/syscall_64.tbl and
include/uapi/asm-generic/unistd.h of Linux; the machine of a filter: include/uapi/linux/{filter,seccomp,audit}.h.
"""

from __future__ import annotations

import errno
import platform
import struct

from vespo_megatron.errors import UserError

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "setns": (308, 268),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
"""Numbers on x86_64 and aarch64."""
_PRCTL, _SET_PARENT_DEATH_SIGNAL = (157, 167), 1
_CLONE, _CLONE3 = (56, 220), 435
_NAMESPACE_FLAGS = 0x7E020000
"""CLONE_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID and _NEWNET."""
_X32 = 0x40000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
"""Places in `seccomp_data`; of the first argument its low half (both machines are little-endian)."""
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def filter_program() -> bytes:
    """The filter for this machine, an array of `struct sock_filter`.

    Raises:
        UserError: the machine is neither x86_64 nor aarch64.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise UserError(
            f"is {machine}", where="the machine, for programs of the code reward", expected=" or ".join(_ARCHITECTURES)
        )
    column = list(_ARCHITECTURES).index(machine)
    return b"".join(
        [
            _do(_LOAD, _ARCHITECTURE_AT),
            *_when(_EQUAL, _ARCHITECTURES[machine], _do(_LOAD, _NUMBER_AT), otherwise=_do(_RETURN, _KILL)),
            *_refuse(_AT_LEAST, _X32, errno.ENOSYS),
            *(part for numbers in _REFUSED.values() for part in _refuse(_EQUAL, numbers[column], errno.EPERM)),
            *_refuse(_EQUAL, _CLONE3, errno.ENOSYS),  # its flags are out of a filter's reach; libc then takes clone
            _do(_EQUAL, _PRCTL[column], 0, 3),
            _do(_LOAD, _FIRST_ARGUMENT_AT),
            *_refuse(_EQUAL, _SET_PARENT_DEATH_SIGNAL, errno.EPERM),  # what ends it with its parent
            _do(_LOAD, _NUMBER_AT),
            _do(_EQUAL, _CLONE[column], 0, 3),
            _do(_LOAD, _FIRST_ARGUMENT_AT),
            *_refuse(_ANY_BIT, _NAMESPACE_FLAGS, errno.EPERM),
            _do(_RETURN, _ALLOW),
        ]
    )


def _do(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _refuse(test: int, value: int, error: int) -> list[bytes]:
    return [_do(test, value, 0, 1), _do(_RETURN, _ERRNO | error)]


def _when(test: int, value: int, then: bytes, otherwise: bytes) -> list[bytes]:
    return [_do(test, value, 1, 0), otherwise, then]
