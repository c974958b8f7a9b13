"""Checkpoints as folders: which are complete, which are damaged, which are kept. Files only, no processes.

`<run>/checkpoints/step_000012/` holds::

    policy/          weights, optimizer, schedule and random states, by megatron-core (`megatron/checkpoint.py`)
    controller.pt    position in the prompts and, asynchronous, the sample buffer
    trainer.json     step, weight version, layout and the like
    manifest.json    size and xxh3 checksum of every file, the step's metrics; written last

A checkpoint is written as `step_000012.partial` and renamed when its manifest is on the disk, so that what has the
plain name is whole. Age is told by steps, never by clocks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from vespo_megatron.errors import UserError

MANIFEST = "manifest.json"
POLICY = "policy"
_NAME = re.compile(r"step_(\d{6,})")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    size: int
    checksum: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Read the whole file."""
        digest = xxhash.xxh3_128()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
            return cls(file.tell(), digest.hexdigest())


@dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints stay: the newest `last`, and the `top` best by `metric` (newest without one; None: all)."""

    last: int = 1
    top: int | None = None
    metric: str | None = None
    higher_is_better: bool = True


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def begin(self, step: int) -> Path:
        """An empty folder to write a checkpoint into; what an earlier attempt left unfinished goes."""
        for leftover in self.root.glob("step_*.partial"):
            shutil.rmtree(leftover)
        partial = self.root / f"step_{step:06d}.partial"
        (partial / POLICY).mkdir(parents=True)
        return partial

    def publish(self, partial: Path, files: Mapping[str, FileEntry], metrics: Mapping[str, Any]) -> Path:
        """Write the manifest of everything in `partial` and give the folder its name, which only a whole one has."""
        manifest = {"files": {name: vars(entry) for name, entry in sorted(files.items())}, "metrics": dict(metrics)}
        with (partial / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(partial)
        final = partial.with_suffix("")
        if final.exists():  # the same step again, after a resume from an earlier one
            _remove(final)
        partial.replace(final)
        _sync_folder(self.root)
        return final

    def checkpoints(self) -> dict[int, Path]:
        """Step → folder of every finished checkpoint, newest first."""
        found = {}
        for folder in self.root.glob("step_*") if self.root.is_dir() else ():
            match = _NAME.fullmatch(folder.name)
            if match and (folder / MANIFEST).is_file():
                found[int(match[1])] = folder
        return dict(sorted(found.items(), reverse=True))

    def prune(self, kept: RetentionPolicy) -> list[int]:
        """Remove what need not be kept; returns the steps that went."""
        found = self.checkpoints()
        stay = set(list(found)[: kept.last])
        if kept.top is None:
            return []
        ranked = list(found)
        if kept.metric is not None:
            sign = 1.0 if kept.higher_is_better else -1.0
            known = {step: _metric(folder, kept.metric) for step, folder in found.items()}
            values = {step: value for step, value in known.items() if value is not None}
            ranked = sorted(values, key=lambda step: -sign * values[step])  # newest first, where equal
        stay.update(ranked[: kept.top])
        gone = [step for step in found if step not in stay]
        for step in gone:
            _remove(found[step])
        return gone


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest. Raises UserError when it is not one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = {name: FileEntry(**entry) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot be read ({error})", where=str(folder / MANIFEST)) from None
    return {**manifest, "files": entries}


def damage(folder: Path, names: Iterable[str]) -> list[str]:
    """What is wrong with these files of a checkpoint, compared with its manifest; empty when nothing is."""
    files = read_manifest(folder)["files"]
    found = []
    for name in names:
        path, wanted = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != wanted.size:
                found.append(f"{name} has {size} bytes, written were {wanted.size}")
            elif FileEntry.of(path) != wanted:
                found.append(f"{name} has other bytes than were written")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def _metric(folder: Path, name: str) -> float | None:
    try:
        return read_manifest(folder)["metrics"].get(name)
    except UserError:
        return None


def _remove(folder: Path) -> None:
    """Without its manifest first, so that a half removed one is none."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
