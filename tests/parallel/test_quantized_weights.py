"""Weights rounded on their way to the engine: the same bits from every layout, into every engine, and nowhere else."""

from __future__ import annotations

import layout_work
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_layout_parity import LAYOUTS

from vespo_megatron.quantization import WeightQuantizer, fake_quantize
from vespo_megatron.recipe.schema import MismatchConfig
from vespo_megatron.rollout_sglang.checksum import WeightChecksum
from vespo_megatron.trainer.controller_link import ControllerLink

INT4 = MismatchConfig(weights="int4", group_size=24)
FP8 = MismatchConfig(weights="fp8_e4m3")


class Receiver:
    """What a link needs of a controller; it keeps what arrives."""

    def __init__(self):
        self.arrived = {}

    def update_weights(self, stream, version, *, between):
        self.arrived = {name: tensor.clone() for name, tensor in stream}


class Sender(Receiver):
    """It hands on to an engine."""

    def __init__(self, engine):
        super().__init__()
        self.engine, self.checksum = engine, ""

    def update_weights(self, stream, version, *, between):
        self.checksum = self.engine.update_weights(stream, version)


def arrived(store: str, folder: str, layout: dict, mismatch: MismatchConfig) -> tuple[dict, dict]:
    """What arrives at the engine, and the policy's weights after that."""
    policy = layout_work.build(folder, layout, store)
    receiver = Receiver() if policy.rank_info.rank == 0 else None
    quantizer = WeightQuantizer.of(policy.config.with_values({"generation.mismatch": mismatch}))
    ControllerLink(policy, receiver, dist.group.WORLD, quantizer=quantizer).push_weights(3)
    return receiver.arrived if receiver else {}, layout_work.weights(policy)


def served(store: str, recipe, layout: dict, urls: list[str] | None, version: int) -> str:
    """The checksum that engine and trainer agree on after a push."""
    from vespo_megatron.rollout_sglang import connect
    from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine

    folder = recipe.policy.model_name
    policy = layout_work.build(folder, layout, store)
    sender = None
    if policy.rank_info.rank == 0:
        sender = Sender(connect(recipe, urls) if urls else InProcessEngine(folder))
    quantizer = WeightQuantizer.of(recipe.policy)
    try:
        ControllerLink(policy, sender, dist.group.WORLD, quantizer=quantizer).push_weights(version)
    finally:
        if sender is not None:
            sender.engine.close()
    return sender.checksum if sender else ""


def expected(folder, mismatch: MismatchConfig) -> dict[str, torch.Tensor]:
    """Of the file, without a policy: linear layers rounded."""
    return {
        name: fake_quantize(tensor, mismatch.weights, mismatch.group_size) if "_proj." in name else tensor
        for name, tensor in load_file(f"{folder}/model.safetensors").items()
    }


def checksum_of(tensors: dict[str, torch.Tensor]) -> str:
    total = WeightChecksum()
    for name, tensor in tensors.items():
        total.add(name, tensor)
    return total.hexdigest()


@pytest.mark.parametrize("mismatch", [INT4, FP8], ids=["int4", "fp8"])
@pytest.mark.parametrize("name", ["one", "tp2_ep2", "pp2"])
def test_the_engine_gets_the_same_bits_from_every_layout_and_the_policy_keeps_its_own(
    name, mismatch, workers, checkpoint
):
    world_size, layout = (LAYOUTS | {"one": (1, {})})[name]
    folder = checkpoint[0]
    got, kept = workers.run(arrived, world_size, folder=folder, layout=layout, mismatch=mismatch)[0]
    wanted, original = expected(folder, mismatch), load_file(f"{folder}/model.safetensors")
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name
        assert torch.equal(kept[name], original[name]), name
    changed = [name for name in wanted if not torch.equal(wanted[name], original[name])]
    assert changed == [name for name in wanted if "_proj." in name]


@pytest.mark.parametrize(
    ("engine", "transport"),
    [
        ("in_process", ""),
        pytest.param("sglang", "distributed", marks=pytest.mark.sglang),
        pytest.param("sglang", "tensor", marks=pytest.mark.sglang),
        pytest.param("sglang", "disk", marks=pytest.mark.sglang),
    ],
)
def test_the_checksum_of_engine_and_trainer_is_that_of_the_rounded_weights(
    engine, transport, workers, tiny_recipe, tmp_path, request
):
    urls, values = None, {"policy.generation.mismatch": INT4}
    if engine == "sglang":
        urls = request.getfixturevalue("sglang_servers").urls
        where = "policy.generation.sglang_cfg"
        values |= {f"{where}.weight_transport": transport, f"{where}.weight_folder": str(tmp_path / "weights")}
    recipe = tiny_recipe.with_values(values)
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}
    answers = workers.run(served, 2, recipe=recipe, layout=layout, urls=urls, version=700)
    folder = recipe.policy.model_name
    assert answers[0] == checksum_of(expected(folder, INT4)) != checksum_of(load_file(f"{folder}/model.safetensors"))
