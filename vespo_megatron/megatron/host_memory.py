"""Returns free memory of the C allocator (glibc) to the operating system.

glibc keeps the memory of freed tensors for the next ones, but those of another micro-batch seldom fit the holes: after
a few updates of a medium model nearly half of the process was holes, which a rollout engine beside it could not use.
"""

from __future__ import annotations

import ctypes
import functools

_MUCH = 256 << 20
"""Bytes. Holes of less than that are not worth a look through the heap, which takes milliseconds."""


class _HeapInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def return_free_memory() -> None:
    """Give back whole pages that malloc holds free, where they are many. Does nothing without glibc 2.33."""
    libc = _libc()
    if libc is not None and libc.mallinfo2().fordblks > _MUCH:
        libc.malloc_trim(0)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = _HeapInfo
    return libc
