"""A pack cut where the kernel changes, and a long sequence that goes alone: padding takes no part."""

import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.attention_candidate import LONG, STEP, alone, runs_of

PACKS = [
    (5,),
    (LONG,),
    (3, LONG - 1, 9),
    (LONG, 2, 7),
    (2, 7, LONG + 1),
    (4, LONG, LONG + 5, 8, 9, 2 * LONG, 1),
    (LONG, LONG),
]


@pytest.mark.parametrize("lengths", PACKS)
def test_runs_are_the_pack_in_order(lengths):
    found = []
    for run in runs_of(list(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)):
        inside = [run.tokens] if run.offsets is None else run.offsets.diff().tolist()
        assert sum(inside) == run.tokens and max(inside) == run.longest
        assert (run.offsets is None) == (run.longest >= LONG)
        assert run.offsets is None or (run.offsets[0] == 0 and run.offsets.dtype is torch.int32)
        found += inside
    assert tuple(found) == lengths


@pytest.mark.parametrize("length", [1, STEP - 1, STEP, STEP + 3])
def test_a_sequence_alone_is_causal_attention_and_padding_takes_no_part(length):
    torch.manual_seed(0)
    query, key, value = (torch.randn(length, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    found = alone(query, key, value)
    both = [each.repeat_interleave(2, 1).transpose(0, 1) for each in (key, value)]
    wanted = F.scaled_dot_product_attention(query.transpose(0, 1), *both, is_causal=True).transpose(0, 1)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, (query, key, value), upstream),
        torch.autograd.grad(wanted, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
