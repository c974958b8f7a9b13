"""A trainer process on a GPU of a `FakeNode`: it computes on the CPU, and notes what it would hold there."""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path

import torch
from fake_node import FakeNode

from vespo_megatron.launch import worker
from vespo_megatron.megatron import parallel, policy
from vespo_megatron.megatron.parked_memory import PARTS, ParkedMemory
from vespo_megatron.rollout_sglang.weight_sync.session import WeightSync

SIZES = {"parameters": 12.0, "gradients": 16.0, "optimizer": 30.0}
ACTIVATIONS, BUCKETS = 8.0, 1.0
_LOOKS_S = 3.0
"""An update lasts so long while a server is dead: the launcher, which looks five times a second, sees it meanwhile."""


def noted(*changes: tuple[str, float], lasts: bool):
    """A decorator: the call takes this, and gives it back at its end unless it lasts."""

    def decorate(function):
        @functools.wraps(function)
        def call(*arguments, **named):
            for what, gib in changes:
                note(what, gib)
            try:
                return function(*arguments, **named)
            finally:
                for what, gib in () if lasts else changes:
                    note(what, -gib)

        return call

    return decorate


def note(what: str, gib: float) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    FakeNode.here().note(f"trainer {rank}", os.environ["CUDA_VISIBLE_DEVICES"].split(",")[rank], what, gib)
    if what == "activations" and gib > 0 and FakeNode.here().lacks_a_server:
        time.sleep(_LOOKS_S)


def moving(function, sign: int):
    """`park` or `restore`, with what it moves noted: before memory is taken, after it is given back."""

    @functools.wraps(function)
    def call(memory, *parts):
        wanted = [part for part in parts or PARTS if (part in memory.parked) == (sign > 0)]
        if sign < 0:
            function(memory, *parts)
        for part in wanted:
            note(part, sign * SIZES[part])
        if sign > 0:
            function(memory, *parts)

    return call


if __name__ == "__main__":
    parallel.pick_device = lambda wanted: torch.device("cpu")
    policy.build_model = noted(*list(SIZES.items())[:2], lasts=True)(policy.build_model)
    policy.build_optimizer = noted(("optimizer", SIZES["optimizer"]), lasts=True)(policy.build_optimizer)
    policy.MegatronPolicy.update = noted(("activations", ACTIVATIONS), lasts=False)(policy.MegatronPolicy.update)
    WeightSync._stream = noted(("buckets", BUCKETS), lasts=False)(WeightSync._stream)
    ParkedMemory.park, ParkedMemory.restore = moving(ParkedMemory.park, -1), moving(ParkedMemory.restore, +1)
    sys.exit(worker.main(Path(sys.argv[1]), sys.argv[2]))
