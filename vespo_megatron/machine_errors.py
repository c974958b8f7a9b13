"""What the machine refuses (room, permission, open files, memory), as one message in place of a traceback."""

from __future__ import annotations

import errno
import os

from vespo_megatron.errors import UserError

_TO_DO = {
    errno.EACCES: "give this user the right to it, or name another place",
    errno.EPERM: "give this user the right to it, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOSPC: "free space there, or name another place",
    errno.EDQUOT: "free space there, or name another place",
    errno.EIO: "see the kernel's log: the device fails",
    errno.ESTALE: "mount it again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close programs: the machine's table of open files is full",
    errno.ENOMEM: "raise the limit of memory (ulimit -v, the container's), or run less beside it",
    errno.EAGAIN: "raise the limits of processes and of memory (ulimit -u and -v, the container's)",
}
_MEMORY = ("failed to map segment", "cannot allocate memory", "can't allocate memory", "bad_alloc", "bad alloc")
_FILES = ("too many open files",)
_THREADS = ("can't start new thread", "resource temporarily unavailable")


def explained(error: BaseException) -> UserError | None:
    """The message for an error that says what the machine refused; None where it says anything else."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _TO_DO:
        return UserError(os.strerror(error.errno), where=_place(error), fix=_TO_DO[error.errno])
    if isinstance(error, FileNotFoundError) and not error.filename and not _has_working_directory():
        return UserError("is gone", where="the working directory", fix="change to one that is there")
    text = str(error).lower()
    if isinstance(error, MemoryError) or (_is_of_a_library(error) and any(words in text for words in _MEMORY)):
        return UserError(f"not enough memory ({error or 'none is left'})", fix=_TO_DO[errno.ENOMEM])
    if _is_of_a_library(error) and any(words in text for words in _FILES):
        return UserError("too many open files", where="this process", fix=_TO_DO[errno.EMFILE])
    if isinstance(error, RuntimeError) and any(words in text for words in _THREADS):
        return UserError(str(error), fix=_TO_DO[errno.EAGAIN])
    return None


def _is_of_a_library(error: BaseException) -> bool:
    return isinstance(error, (ImportError, RuntimeError, OSError))


def _place(error: OSError) -> str:
    return str(error.filename) if error.filename is not None else "this process"


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True
