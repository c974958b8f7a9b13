"""This package as a wheel, and an environment that holds nothing but it, torch, NumPy and what those two need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "vespo_megatron")


def run(*command: str | Path, timeout: float = 170, **options) -> subprocess.CompletedProcess:
    """The command, its output as text; what PYTHONPATH names here is nothing to it, nor to pip."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    parts = [str(part) for part in command]
    return subprocess.run(parts, capture_output=True, text=True, timeout=timeout, env=environment, **options)


def checked(*command: str | Path, timeout: float = 170, **options) -> str:
    """What the command prints; an AssertionError with all it said where it fails."""
    done = run(*command, timeout=timeout, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """The wheel of this source, made in `folder` from a copy: a build leaves files beside setup.py."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir")
    checked(*pip, folder, source)
    (wheel,) = folder.glob("vespo_megatron-*.whl")
    return wheel


def canonical(name: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed_by(*packages: str) -> set[str]:
    """These packages and everything that they need without an extra, of what is installed here."""
    found: set[str] = set()
    left = list(packages)
    while left:
        name = canonical(left.pop())
        if name not in found:
            found.add(name)
            lines = [line for line in metadata.requires(name) or [] if "extra ==" not in line]
            names = (re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines)
            left += [needed for needed in names if _version(needed)]  # not those of another platform or Python
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def empty_environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment of `wheel` and links to torch, NumPy and what they need: its Python."""
    checked(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    packages = Path(checked(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    for name in needed_by("torch", "numpy"):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            target = packages / top
            if not target.exists():
                target.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    checked(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return python
