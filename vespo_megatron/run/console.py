"""What a run prints, which may not end it: a reader that has gone (`| head`, a closed terminal), a full log disk."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

_GONE = (errno.EPIPE, errno.EIO)


def outlive_readers() -> None:
    """From here on nothing that this process prints can fail; what nobody takes is dropped."""
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        sys.stdout = _that_cannot_fail(sys.stdout)
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        sys.stderr = _that_cannot_fail(sys.stderr)


def _that_cannot_fail(stream: Any) -> io.TextIOWrapper:
    raw = _Output(stream.fileno())
    lines = stream.line_buffering or raw.isatty()
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors="backslashreplace", line_buffering=lines
    )


class _Output(io.RawIOBase):
    """A file descriptor that takes whatever it is given; a reader that has gone is followed by the null device."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: Any) -> int:
        """Returns how much went, which is all where it is dropped."""
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            if error.errno in _GONE:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._descriptor)
                os.close(null)
            return len(data)

    def writable(self) -> bool:
        """Yes."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._descriptor)
