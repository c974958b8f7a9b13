"""One pool of workers and one tiny checkpoint for every test of this folder."""

from __future__ import annotations

import pytest
from random_checkpoint import make_checkpoint
from worker_pool import WorkerPool


@pytest.fixture(scope="session")
def workers():
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """(folder, transformers model) of a 4-layer model, one layer of it dense, vocabulary not a multiple of 4."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return str(folder), make_checkpoint(folder)
