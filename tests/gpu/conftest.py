"""Tests that mean something on a GPU. Those marked `cuda` need one; the others run, small, wherever the suite does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from gpu_report import report as tell

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))  # its models, batches and pool of processes

from random_checkpoint import make_checkpoint

torch.backends.cuda.matmul.allow_tf32 = False
# cuBLAS reads it when it starts; without it deterministic algorithms are refused.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The card, where there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def own_variables():
    """What tests set for a process group of one is gone with them: a command that finds RANK would join it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


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
        tell(test=request.node.name, **figures)

    return write


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """(folder, transformers model) of the model that layouts are tested with."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return str(folder), make_checkpoint(folder)


def pytest_runtest_logreport(report):
    """A failure is told of at once: pytest tells at its end, and a part that takes too long has none."""
    if report.failed and "/gpu/" in report.fspath:
        tell(test=report.nodeid, failed=str(report.longrepr)[-3000:])


def pytest_collection_modifyitems(items):
    """A kernel's first run compiles it."""
    for item in items:
        if "/gpu/" in str(item.fspath) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(120))


# ---- tests in this process, alone in a process group -----------------------------------------------------------------


@pytest.fixture
def host_generator() -> torch.Generator:
    """On the host, so that a test's inputs are the same on every device."""
    return torch.Generator().manual_seed(int(os.environ.get("VESPO_GPU_SEED", 0)))


@pytest.fixture
def close(note) -> Callable[..., None]:
    """`close(name, found, wanted, bound)`: ‖found − wanted‖ / ‖wanted‖ is at most `bound`; NaN never is."""

    def check(name: str, found: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
        assert found.shape == wanted.shape, f"{name}: shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
        wanted = wanted.detach().double()
        error = float((found.detach().to(wanted.device).double() - wanted).norm()) / (float(wanted.norm()) or 1.0)
        note(**{name: error})
        assert error <= bound, f"{name}: relative error {error:.3g}, at most {bound:.3g} is allowed"

    return check


def _joined(device: torch.device, folder: Path) -> Iterator[object]:
    """This process alone in a process group and in megatron-core's parallel state."""
    from vespo_megatron.megatron import parallel
    from vespo_megatron.recipe.schema import MegatronConfig

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        yield parallel.initialize(MegatronConfig(), seed=1, device=device, init_method=f"file://{folder}/store")
        parallel.finalize()


@pytest.fixture(scope="module")
def rank_info(device, tmp_path_factory) -> Iterator[object]:
    """Gone after the module: other tests have processes and groups of their own."""
    yield from _joined(device, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The checkpoint of `gpu_policy`."""
    from gpu_policy import make_checkpoint as make

    return make(tmp_path_factory.mktemp("tiny"))
