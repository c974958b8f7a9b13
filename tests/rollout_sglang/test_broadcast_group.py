"""The first broadcast of a group, in which NCCL makes its communicator: it ends, whatever becomes of the servers."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.faults import ServerFault
from vespo_megatron.rollout_sglang.weight_sync.broadcast_group import BroadcastGroup


class Backend:
    """ProcessGroupNCCL's part of it: the first call does what a test says, later ones return at once."""

    def __init__(self, first):
        self.first, self.threads = first, []

    def broadcast(self, tensors, options):
        self.threads.append(threading.current_thread())
        if len(self.threads) == 1:
            return self.first()
        return "work"


def group(first, timeout_s=0.3):
    return BroadcastGroup(Backend(first), None, "weights", 2, timeout_s)


def fails():
    raise ServerFault("is gone", url="http://127.0.0.1:1")


def nothing():
    pass


def test_a_communicator_that_never_stands_is_given_up_at_the_deadline():
    over = threading.Event()
    since = time.monotonic()
    with pytest.raises(UserError, match="could not start: no answer within 0.3 s"):
        group(lambda: over.wait(30)).broadcast(torch.ones(1), nothing)
    assert time.monotonic() - since < 5
    over.set()


def test_a_server_that_is_lost_meanwhile_is_named_at_once():
    over = threading.Event()
    since = time.monotonic()
    with pytest.raises(ServerFault, match="is gone"):
        group(lambda: over.wait(30), timeout_s=30).broadcast(torch.ones(1), fails)
    assert time.monotonic() - since < 5
    over.set()


def test_nccl_s_own_error_is_one_of_ours():
    def broken():
        raise dist.DistBackendError("NCCL error in: NCCLUtils.hpp:1, unhandled system error\nmore")

    with pytest.raises(UserError, match="could not start: NCCL error in: NCCLUtils.hpp:1, unhandled system error"):
        group(broken).broadcast(torch.ones(1), nothing)


def test_later_broadcasts_are_started_where_they_are_asked_for():
    weights = group(lambda: "first")
    assert weights.broadcast(torch.ones(1), nothing) == "first"
    assert weights.broadcast(torch.ones(1), nothing) == "work"
    first, second = weights._backend.threads
    assert second is threading.current_thread() and first is not second
