"""Files that survive the machine: what a power cut may not take away is on the disk before it gets its name."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Return when a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folders(folder: Path) -> None:
    """The names in a folder and in every one below it."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)


def publish_folder(partial: Path, final: Path) -> None:
    """Give a folder that is whole its name, once all of it is on the disk."""
    for path in partial.rglob("*"):
        if path.is_file():
            sync(path)
    sync_folders(partial)
    partial.replace(final)
    sync(final.parent)
