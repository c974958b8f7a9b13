"""Workers whose megatron-core finds the stand-in for Transformer Engine (tests/te_stub), and workers without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

PARALLEL = Path(__file__).parents[1] / "parallel"
STUB = Path(__file__).parents[1] / "te_stub"
sys.path.append(str(PARALLEL))  # what its ranks run, these ranks run too

from random_checkpoint import make_checkpoint  # noqa: E402
from worker_pool import WorkerPool  # noqa: E402


class StubbedPool(WorkerPool):
    """A `WorkerPool` with the stand-in first on its path; a spawned process takes over its parent's `sys.path`."""

    def _grow(self, size: int) -> None:
        sys.path.insert(0, str(STUB))
        try:
            super()._grow(size)
        finally:
            sys.path.remove(str(STUB))


@pytest.fixture(scope="session")
def te_workers():
    pool = StubbedPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def plain_workers():
    """The layers as they run on every CPU, with nothing of Transformer Engine: what the others are held to."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a 4-layer model, one layer of it dense."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder)
    return str(folder)
