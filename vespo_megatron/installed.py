"""What of the extra [train] is not installed: without it the package is `vespo_megatron.losses` alone."""

from __future__ import annotations

import re
from importlib import metadata

TRAIN = 'extra == "train"'


def missing_packages() -> list[str]:
    """Packages of the extra [train] that are not installed here, by this package's own metadata.

    Empty where they all are, or where this package runs from its source without being installed.
    """
    try:
        requirements = metadata.requires("vespo-megatron") or []
    except metadata.PackageNotFoundError:
        return []
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements if TRAIN in line]
    return [name for name in names if not _is_installed(name)]


def what_to_install(command: str, error: ModuleNotFoundError) -> str | None:
    """What a command says that ended for want of a module, in a line; None where nothing of [train] is missing."""
    if not (missing := missing_packages()):
        return None
    return (
        f"{command} needs {error.name}, which is not installed: pip install 'vespo-megatron[train]' brings it and "
        f"whatever else is missing ({len(missing)} packages)"
    )


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
