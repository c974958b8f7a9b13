"""Where these tests run: on the GPU where there is one, small ones on the CPU as well."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator

import pytest
import torch

# cuBLAS reads it when it starts; without it it may add in another order from one call to the next.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items):
    """What only CUDA can run is skipped elsewhere, by name, rather than failing for want of a device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def generator() -> torch.Generator:
    """On the host, so that a test's inputs are the same on every device."""
    return torch.Generator().manual_seed(int(os.environ.get("VESPO_GPU_SEED", 0)))


@pytest.fixture
def record(request) -> Callable[[str, float], None]:
    """`record(name, value)` adds a line of JSON to the file that `VESPO_GPU_REPORT` names."""
    path = os.environ.get("VESPO_GPU_REPORT")

    def write(name: str, value: float) -> None:
        if path:
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            line = {"test": request.node.name, "name": name, "value": value, "device": device}
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")

    return write


@pytest.fixture
def close(record) -> Callable[..., None]:
    """`close(name, found, wanted, bound)`: ‖found − wanted‖ / ‖wanted‖ is at most `bound`; NaN never is."""

    def check(name: str, found: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
        assert found.shape == wanted.shape, f"{name}: shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
        error = relative_error(found, wanted)
        record(name, error)
        assert error <= bound, f"{name}: relative error {error:.3g}, at most {bound:.3g} is allowed"

    return check


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64; of a wanted zero ‖found‖."""
    wanted = wanted.detach().double()
    found = found.detach().to(wanted.device).double()
    size = float(wanted.norm()) or 1.0
    return float((found - wanted).norm()) / size


def _joined(device: torch.device, folder) -> Iterator[object]:
    """This process alone in a process group and in megatron-core's parallel state."""
    from vespo_megatron.megatron import parallel
    from vespo_megatron.recipe.schema import MegatronConfig

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        yield parallel.initialize(MegatronConfig(), seed=1, device=device, init_method=f"file://{folder}/store")
        parallel.finalize()


@pytest.fixture(scope="session")
def lasting_rank_info(device, tmp_path_factory):
    yield from _joined(device, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def rank_info(device, request, tmp_path_factory):
    """Where other folders' tests follow it is gone after the module; NCCL takes seconds to start, and stays."""
    if device.type == "cuda":
        yield request.getfixturevalue("lasting_rank_info")
    else:
        yield from _joined(device, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The tiny checkpoint of `gpu_policy`."""
    from gpu_policy import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("gpu_checkpoint"))
