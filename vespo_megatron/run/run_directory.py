"""Where a run is kept: `<exp_dir>/<name>/<version>/`, made so that no two runs share one."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import differences, load_recipe
from vespo_megatron.recipe.schema import ExpManagerConfig, Recipe

RECIPE_FILE = "recipe.yaml"
FINAL_HF = Path("checkpoints") / "final_hf"
"""The policy that a run has come to, as a Hugging Face folder."""
READY_FILE = Path("servers") / "ready"
"""The URLs of the servers that a `vespo-megatron serve` keeps, a line each, as long as it does."""
_SGLANG = "policy.generation.sglang_cfg"
_MAY_CHANGE = (f"{_SGLANG}.urls", f"{_SGLANG}.weight_folder", "exp_manager.resume_if_exists", "data.on_change")


def make_run_directory(config: ExpManagerConfig) -> Path:
    """The directory of this run, new unless `exp_manager.resume_if_exists` finds one to continue.

    Without a version it is the next free `version_<n>` (with `resume_if_exists`: the latest there is). Two launches at
    the same moment get two directories: the file system decides.

    Raises:
        UserError: the given version exists and is not to be resumed, or the directory cannot be made.
    """
    parent = Path(config.exp_dir) / config.name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if config.version is not None:
            return _given(parent / config.version, config.resume_if_exists)
        numbers = version_numbers(parent)
        if config.resume_if_exists and numbers:
            return parent / f"version_{numbers[-1]}"
        for number in itertools.count(numbers[-1] + 1 if numbers else 0):
            try:
                (parent / f"version_{number}").mkdir()
                return parent / f"version_{number}"
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(
            f"cannot make {error.filename or parent} ({error.strerror})",
            where="exp_manager.exp_dir",
            expected="a folder that can be written",
        ) from None
    raise AssertionError("unreachable")


@contextmanager
def said_ready(run_dir: Path, urls: Sequence[str]) -> Iterator[None]:
    """Within the block `READY_FILE` is there, whole."""
    file = run_dir / READY_FILE
    partial = file.with_name(f".{file.name}")
    file.parent.mkdir(exist_ok=True)
    partial.write_text("".join(f"{url}\n" for url in urls))
    partial.replace(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Within the block this process is the only one that writes to the run; the kernel ends a dead one's claim.

    Raises:
        UserError: another process has it, or this one may not write there.
    """
    with _opened(run_dir / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"another run writes to it ({file.read().strip() or 'it has not said which'})",
                where=str(run_dir),
                fix="wait for it or stop it, or choose another exp_manager.version",
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _opened(path: Path) -> TextIO:
    try:
        return path.open("a+")
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})",
            where=str(path.parent),
            fix="give this user the right to write there, or choose another exp_manager.version",
        ) from None


def changed_keys(run_dir: Path, recipe: Recipe) -> list[str]:
    """`key: old → new` of what a resumed run does otherwise than before; nothing for a new run."""
    saved = run_dir / RECIPE_FILE
    if not saved.exists():
        return []
    changes = differences(load_recipe(saved), recipe)
    return [f"{name}: {old} → {new}" for name, (old, new) in changes.items() if name not in _MAY_CHANGE]


def version_numbers(parent: Path) -> list[int]:
    """The n of every `version_<n>` in `parent`, ascending."""
    found = (re.fullmatch(r"version_(\d+)", entry.name) for entry in parent.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _given(path: Path, resume: bool) -> Path:
    try:
        path.mkdir(exist_ok=resume)
    except FileExistsError:
        raise UserError(
            f"{path} exists",
            where="exp_manager.version",
            fix="choose another version, leave it out for the next free one, or set exp_manager.resume_if_exists=true",
        ) from None
    return path
