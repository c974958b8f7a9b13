"""Where a command writes: whether it can is asked before the work is done, and a failure after it is one error."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vespo_megatron.errors import UserError

PICTURES = (".png", ".svg", ".pdf")
"""Endings of a picture's file."""


def check_file(path: str | Path, where: str, endings: Sequence[str] = ()) -> None:
    """Nothing is known against writing this file; folders above it may be missing, as they are made.

    Args:
        where: the option or key that names it.
        endings: what its name may end in; anything where there are none.

    Raises:
        UserError: another ending, a folder in its place, a file in a folder's, no permission.
    """
    path = Path(path)
    if endings and path.suffix.lower() not in endings:
        raise UserError(f"is {path}", where=where, expected=f"a file name that ends in {', '.join(endings)}")
    with written(path, where):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if path.exists():
            _check_permission(path, os.W_OK)
        _check_folder(path.parent)


def check_folder(path: str | Path, where: str) -> None:
    """Nothing is known against making this folder and writing into it; raises as `check_file` does."""
    with written(path, where):
        _check_folder(Path(path))


@contextmanager
def written(path: str | Path, where: str) -> Iterator[None]:
    """Within the block `path` is written, `where` names it: what the file system does not allow is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error})", where=where, expected="a place that can be written"
        ) from None


def _check_folder(folder: Path) -> None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is no folder")
    _check_permission(folder, os.W_OK | os.X_OK)


def _check_permission(path: Path, mode: int) -> None:
    if not os.access(path, mode):
        raise PermissionError(errno.EACCES, f"{path} may not be written")
