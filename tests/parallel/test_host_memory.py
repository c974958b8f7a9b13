"""Holes in the heap go back to the system."""

from __future__ import annotations

import os

import psutil
import torch

from vespo_megatron.megatron.host_memory import return_free_memory


def test_what_tensors_left_is_given_back_though_one_of_them_lives_on():
    process = psutil.Process(os.getpid())
    small = 64 << 10  # elements, 256 KiB: below what malloc asks the system for
    torch.empty(8 << 20).fill_(1)  # once freed, it raises that limit above `small`
    tensors = [torch.ones(small) for _ in range(1600)]
    del tensors[:-1]
    before = process.memory_info().rss
    return_free_memory()
    assert before - process.memory_info().rss > 300 << 20
    assert tensors[0].sum() == small
