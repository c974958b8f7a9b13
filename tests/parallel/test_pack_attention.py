"""A pack cut where the kernel changes, and a long sequence that goes alone: padding takes no part."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vespo_megatron.megatron.native import pack_attention
from vespo_megatron.megatron.native.pack_attention import LONG, STEP, PackRuns
from vespo_megatron.plan import activations


def test_plan_knows_from_where_sequences_go_alone():
    assert activations.ALONE == LONG


@pytest.mark.parametrize(
    "lengths",
    [
        (5,),
        (LONG,),
        (3, LONG - 1, 9),
        (LONG, 2, 7),
        (2, 7, LONG + 1),
        (4, LONG, LONG + 5, 8, 9, 2 * LONG, 1),
        (LONG, LONG),
    ],
)
def test_runs_are_the_pack_in_order(lengths):
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    runs = PackRuns.of(np.array(lengths), offsets)
    found = []
    for run in runs.runs:
        inside = [run.tokens] if run.offsets is None else run.offsets.diff().tolist()
        assert sum(inside) == run.tokens and max(inside) == run.longest
        assert (run.offsets is None) == (run.longest >= LONG)
        if run.offsets is not None:
            assert run.offsets[0] == 0 and run.offsets.dtype is torch.int32
        found += inside
    assert tuple(found) == lengths
    assert runs.whole.tokens == sum(lengths) and runs.whole.longest == max(lengths)
    assert runs.whole.offsets is offsets


@pytest.mark.parametrize("length", [1, STEP - 1, STEP, STEP + 3])
def test_a_sequence_alone_is_causal_attention_and_padding_takes_no_part(length):
    torch.manual_seed(0)
    query, key, value = (torch.randn(length, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    found = pack_attention._alone(query, key, value, None)
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
