"""Memory of the policy that is given back and taken again: it is gone meanwhile, and training knows nothing of it."""

from __future__ import annotations

import parked_work
import pytest
import torch
from random_checkpoint import make_checkpoint
from test_layout_parity import EP, PP, SP, TP, VPP

from vespo_megatron.errors import UserError
from vespo_megatron.megatron import parked_memory

SHARDED = {"optimizer.use_distributed_optimizer": True}
PLAIN = {"optimizer.use_distributed_optimizer": False}
OVERLAP = {
    "distributed_data_parallel_config.overlap_grad_reduce": True,
    "distributed_data_parallel_config.overlap_param_gather": True,
}
OFFLOAD = {"optimizer.optimizer_cpu_offload": True, "optimizer.optimizer_offload_fraction": 1.0}
LAYOUTS = {
    "one": (1, PLAIN),
    "dp2": (2, SHARDED),
    "dp2_overlap": (2, SHARDED | OVERLAP),
    "dp2_offload": (2, SHARDED | OFFLOAD),
    "dp2_plain": (2, PLAIN),
    "dp2_frozen_router": (2, SHARDED | {"freeze_moe_router": True}),
    "pp2": (2, SHARDED | {PP: 2}),
    "vpp": (2, PLAIN | {PP: 2, VPP: 2}),
    "tp2_ep2": (2, SHARDED | {TP: 2, EP: 2, SP: True}),
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tied"))
    make_checkpoint(folder, tie_word_embeddings=True)
    return folder


def assert_equal_bits(workers, world_size, **given):
    without = workers.run(parked_work.step_by_step, world_size, parked=False, **given)
    parked = workers.run(parked_work.step_by_step, world_size, parked=True, **given)
    for rank, (expected, found) in enumerate(zip(without, parked, strict=True)):
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert ours.keys() == theirs.keys()
            wrong = [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)]
            assert not wrong, (rank, number, wrong)
    assert any(not torch.equal(without[0][0][name], without[0][2][name]) for name in without[0][0] if "weight" in name)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("one", "bfloat16"),
        ("dp2", "float32"),
        ("dp2", "bfloat16"),
        ("dp2_overlap", "bfloat16"),
        ("dp2_offload", "bfloat16"),
        ("dp2_plain", "bfloat16"),
        ("dp2_frozen_router", "float32"),
        ("pp2", "bfloat16"),
        ("vpp", "float32"),
        ("tp2_ep2", "bfloat16"),
    ],
)
def test_training_is_the_same_to_the_last_bit(name, precision, workers, checkpoint):
    world_size, layout = LAYOUTS[name]
    assert_equal_bits(workers, world_size, folder=checkpoint[0], layout=layout, precision=precision)


@pytest.mark.parametrize("name", ["dp2_plain", "pp2"])
def test_so_it_is_with_tied_embeddings(name, workers, tied):
    world_size, layout = LAYOUTS[name]
    assert_equal_bits(workers, world_size, folder=tied, layout=layout, precision="bfloat16")


@pytest.mark.parametrize(("name", "precision"), [("dp2", "float32"), ("dp2_plain", "bfloat16"), ("pp2", "bfloat16")])
def test_no_storage_is_left_and_all_come_back(name, precision, workers, checkpoint):
    world_size, layout = LAYOUTS[name]
    answers = workers.run(parked_work.sizes, world_size, folder=checkpoint[0], layout=layout, precision=precision)
    for found in answers:
        assert sum(found["before"].values()) == found["total"] > 0
        assert found["held"] == 0 and found["after"] == found["total"]
        assert found["away"] == found["before"] and found["gradients"] == 0
        kept = found["before"]["parameters"] + found["before"]["optimizer"]
        assert kept <= found["host"] < kept + (64 << 10), "gradients are not kept"
        assert len(found["refused"]) == 2 and all("are parked" in each for each in found["refused"])


class FullDevice:
    """A storage for which there is room after some attempts."""

    def __init__(self, attempts):
        self.attempts, self.size = attempts, 0

    def resize_(self, size):
        self.attempts -= 1
        if self.attempts >= 0:
            raise torch.OutOfMemoryError("full")
        self.size = size


def test_memory_that_comes_back_late_is_waited_for(monkeypatch):
    monkeypatch.setattr(parked_memory, "_POLL_S", 0.001)
    storage = FullDevice(attempts=3)
    parked_memory._allocate(storage, 1 << 20, torch.device("cpu"))
    assert storage.size == 1 << 20
    monkeypatch.setattr(parked_memory, "_PATIENCE_S", 0.01)
    with pytest.raises(UserError, match="no room for 1 MiB"):
        parked_memory._allocate(FullDevice(attempts=1000), 1 << 20, torch.device("cpu"))
