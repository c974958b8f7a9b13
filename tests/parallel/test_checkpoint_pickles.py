"""What stands in a checkpoint is data, whoever wrote it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, default_planner

from vespo_megatron.megatron.checkpoint_pickles import data_only


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_metadata_runs_nothing_and_is_read_where_it_is_data(tmp_path):
    metadata = tmp_path / ".metadata"
    metadata.write_bytes(pickle.dumps(Attack(tmp_path / "taken")))
    with data_only(), pytest.raises(pickle.UnpicklingError, match="names .*, which is not data"):
        FileSystemReader(tmp_path).read_metadata()
    assert not (tmp_path / "taken").exists()

    torch.distributed.checkpoint.save(
        {"a": torch.ones(2), "b": [1, "c"]}, checkpoint_id=tmp_path / "whole", no_dist=True
    )
    loaded = {"a": torch.zeros(2), "b": None}
    with data_only():
        torch.distributed.checkpoint.load(loaded, checkpoint_id=tmp_path / "whole", no_dist=True)
    assert loaded["a"].tolist() == [1, 1] and loaded["b"] == [1, "c"]


def test_an_object_of_a_checkpoint_runs_nothing(tmp_path):
    content = io.BytesIO()
    torch.save(Attack(tmp_path / "taken"), content)
    content.seek(0)
    planner = default_planner.DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    item = SimpleNamespace(dest_index=SimpleNamespace(fqn="rng"))
    with data_only(), pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        planner.load_bytes(item, content)
    assert not (tmp_path / "taken").exists()
