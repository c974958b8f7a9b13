"""Checkpoints on the device: going on is the same to the last bit, and the host reads them and writes them back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_policy import by_sample, linear_loss, make_batch, make_policy, micro_batches, weights

from vespo_megatron.megatron import checkpoint
from vespo_megatron.megatron.hf_weights import save as save_hf

HERE = Path(__file__).parent


@pytest.fixture
def deterministic():
    """Sums in one order: what is compared to the last bit may not hang on atomic additions."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def save(policy, tiny_folder: Path) -> Path:
    tiny_folder.mkdir()
    checkpoint.save(policy, tiny_folder)()
    return tiny_folder


def updated(policy, batches, count: int = 1):
    for _ in range(count):
        assert policy.update(batches, linear_loss).succeeded
    return weights(policy)


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in wanted.items():
        apart = (found[name].double() - tensor.double()).abs().max()
        assert torch.equal(found[name], tensor), f"{name} differs by up to {apart:.3g}"


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sharded", [True, False])
def test_going_on_is_the_same_to_the_last_bit(precision, sharded, rank_info, tiny_folder, tmp_path):
    settings = {"optimizer.use_distributed_optimizer": sharded}
    policy = make_policy(tiny_folder, rank_info, precision, **settings)
    batches = micro_batches(policy, make_batch())
    kept = updated(policy, batches, 2)
    saved = save(policy, tmp_path / "saved")
    random = torch.rand(3), torch.rand(3, device=rank_info.device)
    went_on = updated(policy, batches, 2)
    other = make_policy(tiny_folder, rank_info, precision, **settings)
    updated(other, batches)
    torch.rand(7, device=rank_info.device)
    checkpoint.load(other, saved, same_layout=True)
    assert_equal(weights(other), kept)
    for one, again in zip(random, (torch.rand(3), torch.rand(3, device=rank_info.device)), strict=True):
        assert torch.equal(one, again), "the generators are not where they were"
    assert_equal(updated(other, batches, 2), went_on)


def test_a_checkpoint_before_the_first_update(rank_info, tiny_folder, tmp_path):
    """Adam has no moments yet; saving makes them, and an update may follow."""
    policy = make_policy(tiny_folder, rank_info)
    batches = micro_batches(policy, make_batch())
    saved = save(policy, tmp_path / "saved")
    after = updated(policy, batches)
    other = make_policy(tiny_folder, rank_info)
    checkpoint.load(other, saved, same_layout=True)
    for name, tensor in updated(other, batches).items():
        assert (tensor - after[name]).norm() <= 1e-5 * after[name].norm(), name


def test_the_hf_folder_is_the_weights(rank_info, tiny_folder, tmp_path):
    policy = make_policy(tiny_folder, rank_info, "bfloat16")
    save_hf(policy.exporter, tmp_path / "saved", copy_from=tiny_folder)
    other = make_policy(tmp_path / "saved", rank_info, "bfloat16")
    assert_equal(weights(other), weights(policy))


@pytest.mark.cuda
def test_the_host_reads_it_and_writes_it_back(rank_info, tiny_folder, tmp_path, close):
    """Another process, which sees no GPU, loads it, scores the samples and saves it; this one loads that."""
    policy = make_policy(tiny_folder, rank_info, "bfloat16")
    batches = micro_batches(policy, make_batch())
    kept = updated(policy, batches, 2)
    saved = save(policy, tmp_path / "saved")
    command = [
        sys.executable,
        str(HERE / "checkpoint_process.py"),
        str(tiny_folder),
        str(saved),
        str(tmp_path / "back"),
    ]
    paths = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    done = subprocess.run([*command, "bfloat16"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads(done.stdout.splitlines()[-1])
    for name, each in by_sample(batches, policy.log_probs(batches)).items():
        close(f"log-probs of {name} on the host", torch.tensor(scores[name]), each[0], 3e-2)
    went_on = updated(policy, batches)
    other = make_policy(tiny_folder, rank_info, "bfloat16")
    checkpoint.load(other, tmp_path / "back", same_layout=True)
    assert_equal(weights(other), kept)
    for name, tensor in updated(other, batches).items():
        assert (tensor - went_on[name]).float().norm() <= 1e-2 * went_on[name].float().norm(), name
