"""The whole policy on the card computes what a process without a card computes: gradients, replayed ones, an update."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import policy_work
import pytest
import torch

HERE = Path(__file__).parent
TOLERANCE = 1e-4
"""Of float32, as between layouts on the host."""


@pytest.fixture(scope="module")
def on_the_device(checkpoint, device):
    return policy_work.everything(checkpoint[0], device)


@pytest.fixture(scope="module")
def on_the_host(checkpoint, tmp_path_factory):
    """Of a process that sees no card."""
    output = tmp_path_factory.mktemp("host") / "answers.pt"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(HERE / "policy_work.py"), checkpoint[0], str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(output, weights_only=False)


def worst(found, wanted):
    """The largest relative error of any tensor; what is zero there has to be zero here."""
    assert found.keys() == wanted.keys()
    errors = {}
    for name, tensor in wanted.items():
        scale = float(tensor.double().norm())
        errors[name] = float((found[name].double() - tensor.double()).norm()) / (scale or 1.0)
    return max(errors.values())


@pytest.mark.parametrize("routes", ["live", "R2", "R3"])
def test_loss_and_gradients_are_the_host_s(routes, on_the_device, on_the_host, note):
    error = worst(on_the_device[routes]["gradients"], on_the_host[routes]["gradients"])
    loss = abs(on_the_device[routes]["loss"] / on_the_host[routes]["loss"] - 1)
    note(gradients=error, loss=loss)
    assert error < TOLERANCE and loss < 10 * TOLERANCE


def test_an_update_moves_every_weight_as_on_the_host(on_the_device, on_the_host, note):
    error = worst(on_the_device["update"], on_the_host["update"])
    note(update=error, norm=abs(on_the_device["grad_norm"] / on_the_host["grad_norm"] - 1))
    # Where a gradient is all but zero, Adam's first step follows its rounding.
    assert error < 1e-2 and on_the_device["grad_norm"] == pytest.approx(on_the_host["grad_norm"], rel=TOLERANCE)
