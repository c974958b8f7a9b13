"""Weights in host memory: bit for bit, whatever pieces they lie in, and as many versions as were asked for."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from vespo_megatron.errors import UserError
from vespo_megatron.megatron import host_weights
from vespo_megatron.megatron.host_weights import HostWeights
from vespo_megatron.megatron.weight_history import WeightHistory


def made_up_weights():
    torch.manual_seed(0)
    return [
        torch.randn(7, 5),
        torch.randn(3, dtype=torch.bfloat16),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.randn(40, dtype=torch.float64),
        torch.empty(0),
        torch.randn(()),
    ]


@pytest.mark.parametrize("piece", [32, 48, 1 << 20])
def test_every_bit_comes_back_wherever_pieces_are_cut(piece, monkeypatch):
    monkeypatch.setattr(host_weights, "_PIECE", piece)
    tensors = made_up_weights()
    copy = HostWeights(tensors)
    copy.copy_from(tensors)
    expected = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    copy.copy_to(tensors)
    for tensor, wanted in zip(tensors, expected, strict=True):
        assert torch.equal(tensor.view(-1).view(torch.uint8), wanted.view(-1).view(torch.uint8))
    assert copy.nbytes < sum(tensor.nbytes for tensor in tensors) + 16 * len(tensors)


def test_other_tensors_than_those_that_were_kept_are_refused():
    copy = HostWeights([torch.zeros(4)])
    with pytest.raises(ValueError, match="12 bytes where 16"):
        copy.copy_from([torch.zeros(3)])
    with pytest.raises(RuntimeError):
        HostWeights([torch.zeros(2, 2)]).copy_from([torch.arange(4.0).view(2, 2).t()])


class MadeUpPolicy:
    """One weight, which an update changes; as `MegatronPolicy` to a history."""

    def __init__(self):
        self.weight, self.updates_taken = torch.zeros(1), 0

    def weights(self):
        return [self.weight]

    def update(self):
        self.weight += 1
        self.updates_taken += 1

    @contextmanager
    def under(self, weights, *, own=None):
        copied = HostWeights(self.weights())
        copied.copy_from(self.weights())
        weights.copy_to(self.weights())
        yield
        (own or copied).copy_to(self.weights())


def value(history, version):
    with history.under(version):
        return history.policy.weight.item()


def test_the_last_versions_are_held_in_the_memory_of_those_that_went():
    history = WeightHistory(MadeUpPolicy(), keep=3)
    for version in range(6):
        with history.pushing(version):
            pass
        history.policy.update()
        history.policy.update()
        if version == 2:
            memory = {id(copy) for copy in history._held.values()}
    assert history.held == [3, 4, 5] and history.nbytes == 3 * 4
    assert {id(copy) for copy in history._held.values()} == memory
    assert [value(history, version) for version in (4, 3, 5)] == [8, 6, 10]
    assert history.policy.weight.item() == 12 and history.live is None


def test_a_version_that_is_sent_again_is_what_it_was():
    """A server that comes back in the middle of `sync_every` steps: its tokens are of the version it is told."""
    history = WeightHistory(MadeUpPolicy(), keep=1)
    with history.pushing(0):
        assert history.policy.weight.item() == 0
    history.policy.update()
    with history.pushing(0):
        assert history.policy.weight.item() == 0
    assert history.policy.weight.item() == 1
    with history.pushing(1):
        assert history.policy.weight.item() == 1
    assert history.live == 1 and history.held == [1] and not history.to_save()


def test_a_new_number_for_weights_that_no_update_changed_is_a_version_like_any():
    """A refused update: the engine has the same weights under the next number."""
    history = WeightHistory(MadeUpPolicy(), keep=2)
    for version in (0, 1):
        with history.pushing(version):
            pass
    assert history.live == 1 and history.held == [0, 1]
    history.policy.update()
    assert value(history, 0) == value(history, 1) == 0


def test_a_version_that_is_gone_names_who_asks_and_what_there_is():
    history = WeightHistory(MadeUpPolicy(), keep=2)
    for version in range(4):
        with history.pushing(version):
            pass
    with (
        pytest.raises(UserError, match=r"sample 7: was drawn by weight version 1[^~]*one of \[2, 3\]"),
        history.under(1, where="sample 7"),
    ):
        pass


def test_a_synchronous_run_holds_nothing_and_knows_its_one_version_until_it_is_updated():
    history = WeightHistory(MadeUpPolicy(), keep=0)
    with history.pushing(5):
        pass
    assert value(history, 5) == 0 and history.nbytes == 0
    history.policy.update()
    with pytest.raises(UserError, match="version 5"), history.under(5):
        pass
