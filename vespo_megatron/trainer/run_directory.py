"""Where a run is kept: `<exp_dir>/<name>/<version>/`, made so that no two runs share one."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import ExpManagerConfig

RECIPE_FILE = "recipe.yaml"


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
