"""A policy on a device, in a process of its own or in the test's, and what of it is compared."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "parallel"), str(Path(__file__).parents[2])]

import layout_work  # noqa: E402

from vespo_megatron.megatron import parallel  # noqa: E402


def everything(folder: str, device: torch.device) -> dict[str, Any]:
    """`layout_work.everything` of one process on this device; every tensor on the host."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with mock.patch.dict(os.environ, alone), tempfile.TemporaryDirectory() as place:
        try:
            found = layout_work.everything(folder, {}, f"file://{place}/store", device=device)
        finally:
            parallel.finalize()
    return on_host(found)


def on_host(answer: Any) -> Any:
    """The same answers, tensors of which are on the host."""
    if isinstance(answer, dict):
        return {name: on_host(value) for name, value in answer.items()}
    return answer.cpu() if isinstance(answer, torch.Tensor) else answer


if __name__ == "__main__":  # python policy_work.py CHECKPOINT OUTPUT: on the CPU, where this process sees no card
    torch.save(everything(sys.argv[1], torch.device("cpu")), sys.argv[2])
