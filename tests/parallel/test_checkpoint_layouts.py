"""Checkpoints: exact in the layout that saved them, equal in any other."""

from __future__ import annotations

import checkpoint_work
import pytest
import torch
from random_checkpoint import make_checkpoint
from test_layout_parity import LAYOUTS, worst


def run(workers, function, name, folder, **arguments):
    world_size, layout = LAYOUTS.get(name, (1, {}))
    return workers.run(function, world_size, folder=folder, layout=layout, **arguments)


@pytest.fixture(scope="module", params=["tp2_ep2", "pp2_cp2_ep2", "vpp", "tp2", "one"])
def saved(request, workers, checkpoint, tmp_path_factory):
    """(layout, folder of the checkpoint, what the policy was and did next)."""
    folder = tmp_path_factory.mktemp(f"saved_{request.param}")
    answers = run(workers, checkpoint_work.save_after_two_updates, request.param, checkpoint[0], checkpoint=str(folder))
    return request.param, folder, answers


def test_the_same_layout_goes_on_to_the_last_bit(saved, workers, checkpoint):
    name, folder, expected = saved
    found = run(workers, checkpoint_work.load_and_go_on, name, checkpoint[0], checkpoint=str(folder), same_layout=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["log_probs"] == theirs["log_probs"]
        assert torch.equal(ours["random"], theirs["random"])
        assert (ours["learning_rate"], ours["grad_norm"]) == (theirs["learning_rate"], theirs["grad_norm"])
    for part in ("weights", "next"):
        assert found[0][part].keys() == expected[0][part].keys()
        assert all(torch.equal(found[0][part][key], tensor) for key, tensor in expected[0][part].items())


@pytest.mark.parametrize("other", ["one", "pp2_cp2_ep2", "tp2_sp_etp2"])
def test_another_layout_holds_the_same_weights_and_updates_alike(saved, other, workers, checkpoint):
    _, folder, expected = saved
    found = run(workers, checkpoint_work.load_and_go_on, other, checkpoint[0], checkpoint=str(folder))[0]
    assert all(torch.equal(found["weights"][key], tensor) for key, tensor in expected[0]["weights"].items())
    assert found["learning_rate"] == expected[0]["learning_rate"]
    assert worst(found["next"], expected[0]["next"]) < 1e-4


@pytest.mark.parametrize("spoil", ["bit", "truncated", "missing"])
def test_a_full_disk_loses_one_checkpoint_and_a_damaged_one_is_passed_over(spoil, workers, checkpoint, tmp_path):
    answers = run(
        workers, checkpoint_work.save_with_faults, "tp2_ep2", checkpoint[0], run_dir=str(tmp_path), spoil=spoil
    )
    for answer in answers:
        first, second, third = answer["saved"]
        assert first.endswith("checkpoints/step_000001") and second == "" and third.endswith("step_000003")
        assert answer["failures"] == 1 and answer["found"] == 1 and answer["equal"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000001", "step_000003"]


def test_when_all_are_damaged_the_run_does_not_begin_anew(workers, checkpoint, tmp_path):
    answers = run(
        workers, checkpoint_work.save_with_faults, "tp2_ep2", checkpoint[0], run_dir=str(tmp_path), spoil="all"
    )
    for answer in answers:
        assert "every checkpoint of the run is damaged" in answer["error"]
        assert "step_000001: policy/__0_0.distcp has 0 bytes" in answer["error"]


def test_a_checkpoint_of_another_model_is_refused(workers, checkpoint, tmp_path):
    saved, other = tmp_path / "saved", tmp_path / "other"
    saved.mkdir()
    make_checkpoint(other, hidden_size=32)
    run(workers, checkpoint_work.save_after_two_updates, "one", checkpoint[0], checkpoint=str(saved))
    (said,) = run(workers, checkpoint_work.load_another_model, "one", str(other), checkpoint=str(saved))
    assert "cannot be loaded" in said and "expected: a checkpoint of this model" in said
