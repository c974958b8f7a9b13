"""The folder of a run, for every test that starts `vespo-megatron train` for real."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import make_folder


@pytest.fixture
def folder(tmp_path, tiny_qwen3_moe_folder) -> Path:
    """Everything a run of two processes needs, and all of it right."""
    return make_folder(tmp_path, tiny_qwen3_moe_folder)


@pytest.fixture
def importable(folder, monkeypatch) -> Path:
    """`folder`, with rewards that a run in another process can import."""
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.syspath_prepend(folder)
    return folder
