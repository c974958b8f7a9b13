"""What a phase takes is what the device worked for it, not how soon the host had asked for it."""

from __future__ import annotations

import time

import torch

from vespo_megatron.trainer.timers import Timers


def test_a_phase_on_a_gpu_ends_when_its_work_is_done(monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(0.05))
    timers = Timers(device=torch.device("cuda", 0))
    with timers("train"):
        pass
    measured = timers.pop()
    assert measured["time/train"] >= 0.05 and measured["memory/train"] == 3.0
