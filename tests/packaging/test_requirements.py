"""What is imported is required, and the pinned set is what the extra [train] asks for."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from installed_wheel import ROOT, canonical
from packaging.requirements import Requirement

OPTIONAL = {"nemo", "sglang", "transformer_engine", "triton", "uvicorn"}
"""Modules that one place each imports where they are there; uvicorn is what SGLang listens with."""


@pytest.fixture(scope="module")
def required():
    """Extra (or "") → its requirements, as setup.py says."""
    given = {}
    source = (ROOT / "setup.py").read_text().replace("from setuptools import find_packages, setup", "")
    names = {"__file__": str(ROOT / "setup.py"), "setup": given.update, "find_packages": lambda **_: []}
    exec(source, names)
    lines = {"": given["install_requires"], **given["extras_require"]}
    return {extra: [Requirement(line) for line in found] for extra, found in lines.items()}


def imported(folder: Path) -> set[str]:
    """Top-level modules of other projects that the files of `folder` import, anywhere in them."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"vespo_megatron", "torchvision"}


def packages_of(modules: set[str]) -> set[str]:
    """The packages that hold these modules."""
    homes = metadata.packages_distributions()
    return {canonical(name) for module in modules for name in homes[module]}


def test_without_an_extra_torch_and_numpy_are_required(required):
    assert {requirement.name for requirement in required[""]} == {"torch", "numpy"}


def test_the_losses_import_no_more_than_that(required):
    assert imported(ROOT / "vespo_megatron" / "losses") <= {"torch", "numpy", "triton", "matplotlib"}


def test_everything_else_that_is_imported_is_of_the_extra_train(required):
    named = {canonical(requirement.name) for requirement in [*required[""], *required["train"]]}
    assert packages_of(imported(ROOT / "vespo_megatron") - OPTIONAL) <= named


def test_the_makefile_installs_the_extra_train_pinned(required):
    pins = {}
    for name in ("torch.txt", "cpu.txt"):
        for line in (ROOT / "requirements" / name).read_text().splitlines():
            if match := re.fullmatch(r"([\w.-]+)==(\S+)", line):
                pins[canonical(match[1])] = match[2]
    for requirement in [*required[""], *required["train"], *required["dev"]]:
        if requirement.name != "vespo-megatron":
            assert requirement.specifier.contains(pins[canonical(requirement.name)]), requirement
    assert re.search(r"--editable '\.\[train\]'", (ROOT / "Makefile").read_text())


@pytest.mark.parametrize("extra", ["te", "nemo", "dev", "bench"])
def test_what_trains_includes_the_extra_train(required, extra):
    assert any(
        requirement.name == "vespo-megatron" and "train" in requirement.extras for requirement in required[extra]
    )
