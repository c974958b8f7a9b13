"""Packages: there, of a version that was tried, and really what they claim to be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, util

from vespo_megatron.doctor.findings import FAIL, OK, WARN, Finding
from vespo_megatron.installed import missing_packages

TRIED = {"torch": ">=2.11,<2.14", "megatron-core": "==0.16.1", "transformers": ">=5.0,<5.20"}
"""Package → the versions it is known to work with."""
SGLANG_CONTRACT = "0.5.23"
"""The HTTP contract that `rollout_sglang` speaks."""


def version_of(package: str) -> str | None:
    """Its installed version; None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def python() -> Iterator[Finding]:
    """Python 3.11 or newer."""
    found = ".".join(map(str, sys.version_info[:3]))
    new_enough = sys.version_info >= (3, 11)
    yield Finding("Python", OK if new_enough else FAIL, found, "" if new_enough else "use Python 3.11 or newer")


def required_packages() -> Iterator[Finding]:
    """What every trainer process imports."""
    if missing := missing_packages():
        yield Finding("packages", FAIL, f"{', '.join(missing)} missing", "pip install 'vespo-megatron[train]'")
    for package, tried in TRIED.items():
        found = version_of(package)
        if found is None:
            yield Finding(package, FAIL, "is not installed", f"pip install '{package}{tried}'")
        elif _was_tried(found, tried):
            yield Finding(package, OK, found)
        else:
            yield Finding(package, WARN, f"{found} has not been tried", f"run make test, or install {package}{tried}")


def _was_tried(version: str, tried: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(tried).contains(version.split("+")[0], prereleases=True)


def transformer_engine() -> Iterator[Finding]:
    """Whether its PyTorch part imports: the bare package installs without it and then raises in megatron-core."""
    if util.find_spec("transformer_engine") is None:
        yield Finding("Transformer Engine", OK, "is not installed: layer_spec native is used")
        return
    works, said = _imports("transformer_engine.pytorch")
    if works:
        yield Finding("Transformer Engine", OK, version_of("transformer-engine") or "imports")
    else:
        yield Finding(
            "Transformer Engine",
            FAIL,
            f"is installed but does not import ({said}), and megatron-core falls over it",
            "pip install 'transformer-engine[pytorch,core_cu12]', or pip uninstall transformer-engine",
        )


def apex() -> Iterator[Finding]:
    """NVIDIA's Apex comes from source alone; `apex` on PyPI is a toolkit for the Pyramid web framework."""
    if util.find_spec("apex") is None:
        yield Finding("Apex", OK, "is not installed: PyTorch's own kernels are used")
    elif util.find_spec("amp_C") is not None or util.find_spec("apex.multi_tensor_apply") is not None:
        yield Finding("Apex", OK, "NVIDIA's")
    else:
        yield Finding(
            "Apex",
            FAIL,
            f"{version_of('apex') or 'what is installed'} is PyPI's impostor, not NVIDIA's",
            "pip uninstall apex",
        )


def sglang() -> Iterator[Finding]:
    """The server here; it may as well live in another environment (sglang_cfg.python) or machine (urls)."""
    found = version_of("sglang")
    if found is None:
        yield Finding(
            "SGLang",
            WARN,
            "is not installed here",
            "name its environment in policy.generation.sglang_cfg.python, or running servers in sglang_cfg.urls",
        )
    elif found.split("+")[0] != SGLANG_CONTRACT:
        yield Finding(
            "SGLang",
            WARN,
            f"{found}; the HTTP contract spoken here is {SGLANG_CONTRACT}'s",
            "pytest tests/rollout_sglang checks the contract against it",
        )
    else:
        yield Finding("SGLang", OK, f"{found}, whose HTTP contract is spoken here")


def nemo() -> Iterator[Finding]:
    """The optional launcher `vespo-megatron-nemo`."""
    found = version_of("nemo-toolkit")
    yield Finding("NeMo", OK, found or "is not installed: recipes are read without it")


def _imports(module: str) -> tuple[bool, str]:
    """Whether `import module` works, tried in a process of its own, and the last line it said."""
    try:
        done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return False, "no end in 180 s"
    return done.returncode == 0, (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]


CHECKS = [python, required_packages, transformer_engine, apex, sglang, nemo]
