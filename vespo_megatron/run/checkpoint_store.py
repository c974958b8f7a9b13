"""Checkpoints as folders: which are complete, which are damaged, which are kept. Files only, no processes.

`<run>/checkpoints/step_000012/` holds::

    policy/          weights, optimizer, schedule and random states, by megatron-core (`megatron/checkpoint.py`)
    controller.pt    position in the prompts and, asynchronous, the sample buffer
    trainer.json     step, weight version, layout and the like
    manifest.json    size and xxh3 checksum of every file; written last

A checkpoint is written as `step_000012.partial` and renamed when all of it is on the disk, so that what has the plain
name is whole. Age is told by steps, never by clocks; how good one is, by the run's record.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from vespo_megatron.durable import sync, sync_folders
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
    def on_disk(cls, path: Path) -> FileEntry:
        """Of a file that was just written: its bytes survive the machine when this returns."""
        sync(path)
        return cls.of(path)  # the page cache still has it

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
    """Which checkpoints stay: the newest `last`, and the `top` best (None: all)."""

    last: int = 1
    top: int | None = None
    higher_is_better: bool = True


@dataclass(frozen=True)
class Judgement:
    """What is known of how good a run's checkpoints are, by step."""

    values: Mapping[int, float]
    """Of the metric that tells the best; steps that have none are not among the best."""
    undecided: Collection[int] = ()
    """Steps whose value is still to come: they stay."""

    def ranked(self, steps: Iterable[int], *, higher_is_better: bool) -> list[int]:
        """Those of `steps` that have a value, the best first; equals in the order they are given in."""
        sign = 1.0 if higher_is_better else -1.0
        return sorted((step for step in steps if step in self.values), key=lambda step: -sign * self.values[step])


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def partial(self, step: int) -> Path:
        """The folder of a checkpoint that is being written."""
        return self.root / f"step_{step:06d}.partial"

    def begin(self, step: int) -> Path:
        """An empty folder to write a checkpoint into; what an earlier attempt left unfinished goes."""
        for leftover in self.root.glob("step_*.partial"):
            shutil.rmtree(leftover)
        partial = self.partial(step)
        (partial / POLICY).mkdir(parents=True)
        return partial

    def publish(self, partial: Path, files: Mapping[str, FileEntry]) -> Path:
        """Write the manifest of everything in `partial` and give the folder its name, which only a whole one has.

        Args:
            files: all that are in it, each as `FileEntry.on_disk` found it.
        """
        manifest = {"files": {name: vars(entry) for name, entry in sorted(files.items())}}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        sync(partial / MANIFEST)
        sync_folders(partial)
        final = partial.with_suffix("")
        if final.exists():  # the same step again, after a resume from an earlier one
            _remove(final)
        partial.replace(final)
        sync(self.root)
        return final

    def discard(self, step: int) -> None:
        """Remove what could not be written whole, so that it takes no room from what comes next."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def checkpoints(self) -> dict[int, Path]:
        """Step → folder of every finished checkpoint, newest first."""
        found = {}
        for folder in self.root.glob("step_*") if self.root.is_dir() else ():
            match = _NAME.fullmatch(folder.name)
            if match and (folder / MANIFEST).is_file():
                found[int(match[1])] = folder
        return dict(sorted(found.items(), reverse=True))

    def prune(self, kept: RetentionPolicy, judged: Judgement | None = None) -> list[int]:
        """Remove what need not be kept; returns the steps that went. The newest are the best where nothing judges."""
        found = self.checkpoints()
        if kept.top is None:
            return []
        stay, ranked = set(list(found)[: kept.last]), list(found)
        if judged is not None:
            ranked = judged.ranked(found, higher_is_better=kept.higher_is_better)  # newest first, where equal
            stay.update(judged.undecided)
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


def _remove(folder: Path) -> None:
    """Without its manifest first, so that a half removed one is none."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)
