"""Tests that mean something on a GPU. Those marked `cuda` need one; the others run, small, wherever the suite does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))  # its models, batches and pool of processes

from random_checkpoint import make_checkpoint

torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The card, where there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def generator(device) -> torch.Generator:
    """Fresh numbers in every run on a card, where a kernel must be right for any; the same ones in the suite."""
    made = torch.Generator(device)
    seed = made.seed() if device.type == "cuda" else 0
    print(f"seed {seed}")
    return made.manual_seed(seed % 2**63)


@pytest.fixture
def note(request):
    """`note(name=value)`: a figure for the page about GPUs, a line of $VESPO_GPU_REPORT where that is set."""

    def write(**figures: float) -> None:
        print(figures)
        if path := os.environ.get("VESPO_GPU_REPORT"):
            with open(path, "a") as report:
                report.write(json.dumps({"test": request.node.name} | figures) + "\n")

    return write


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """(folder, transformers model) of the model that layouts are tested with."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return str(folder), make_checkpoint(folder)


def pytest_collection_modifyitems(items):
    """A kernel's first run compiles it."""
    for item in items:
        if "/gpu/" in str(item.fspath) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(120))
