"""Attention over packed sequences: its values, its gradients, what SDPA runs it with, and what it takes."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vespo_megatron.data.layout import SequenceLayout
from vespo_megatron.megatron.native.attention import PackedAttention, packed_seq_params, padded_attention

# isort: split
from megatron.core.transformer.enums import AttnMaskType

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
"""Those that never hold queries × keys."""


def layer() -> PackedAttention:
    return PackedAttention(
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=SimpleNamespace(cp=SimpleNamespace(size=lambda: 1)),
    )


def inputs(layout, heads, kv_heads, width, dtype, device, host_generator):
    tokens = layout.num_local_tokens
    sizes = (heads, kv_heads, kv_heads)
    made = [
        torch.randn(tokens, count, width, generator=host_generator).to(device, dtype).requires_grad_()
        for count in sizes
    ]
    return made, torch.randn(tokens, heads * width, generator=host_generator).to(device, dtype)


def layout_of(*lengths: int, pad_to: int = 0) -> SequenceLayout:
    return SequenceLayout(lengths=tuple(lengths), prompt_lengths=(1,) * len(lengths), pad_to=pad_to)


def reference(query, key, value, layout):
    """Softmax written out, a sequence and a head at a time, in float64."""
    group = query.shape[1] // key.shape[1]
    parts = []
    for start, length in zip(layout.cu_seqlens, layout.segment_lengths, strict=False):
        rows = slice(int(start), int(start + length))
        q, k, v = (each[rows].transpose(0, 1) for each in (query, key, value))
        scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) / query.shape[2] ** 0.5
        later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        parts.append((weights @ v.repeat_interleave(group, 0)).transpose(0, 1).flatten(1))
    return torch.cat(parts)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (8, 1, 128), (3, 3, 64)])
def test_value_and_gradients_are_those_of_the_formula(
    heads, kv_heads, width, dtype, bound, device, host_generator, close
):
    layout = layout_of(5, 1, 33, 130, 16, 17, 64, pad_to=272)
    (query, key, value), upstream = inputs(layout, heads, kv_heads, width, dtype, device, host_generator)
    output = layer()(query, key, value, None, packed_seq_params=packed_seq_params(layout, device))
    found = torch.autograd.grad(output, (query, key, value), upstream)
    exact = [each.detach().double().requires_grad_() for each in (query, key, value)]
    expected = reference(*exact, layout)
    close("value", output, expected, bound)
    for name, ours, theirs in zip(
        ("query", "key", "value"), found, torch.autograd.grad(expected, exact, upstream.double()), strict=True
    ):
        close(f"gradient of {name}", ours, theirs, 2 * bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("rank", [0, 1])
def test_queries_of_one_context_parallel_rank_see_what_comes_before_them(
    rank, dtype, bound, device, host_generator, close
):
    """The masks of two ranks' layouts, with the keys of both already gathered."""
    whole = layout_of(8, 4, 36, 132, pad_to=192)
    mine = SequenceLayout(whole.lengths, whole.prompt_lengths, 2, rank, pad_to=192)
    (query, key, value), upstream = inputs(whole, 8, 2, 32, dtype, device, host_generator)
    rows = torch.from_numpy(mine.positions).to(device)
    params = packed_seq_params(mine, device)
    with sdpa_kernel(FUSED) if device.type == "cuda" else nullcontext():
        output = padded_attention(query[rows], key, value, params.pack, None).flatten(1)
        found = torch.autograd.grad(output, (query, key, value), upstream[rows])
    exact = [each.detach().double().requires_grad_() for each in (query, key, value)]
    expected = reference(*exact, whole)[rows]
    close("value", output, expected, bound)
    wanted = torch.autograd.grad(expected, exact, upstream[rows].double())
    for name, ours, theirs in zip(("query", "key", "value"), found, wanted, strict=True):
        close(f"gradient of {name}", ours, theirs, 2 * bound)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_length_class_needs_the_backend_that_holds_all_scores(dtype, device, host_generator):
    """32 heads of 128 over 4 of keys, as the 30B model has them."""
    layout = layout_of(3, 20, 100, 700, 701, 3000, pad_to=4608)
    (query, key, value), upstream = inputs(layout, 32, 4, 128, dtype, device, host_generator)
    params = packed_seq_params(layout, device)
    with sdpa_kernel(FUSED):
        output = padded_attention(query, key, value, params.pack, None).flatten(1)
        output.backward(upstream)
    assert all(bool(each.isfinite().all()) for each in (output, query.grad, key.grad, value.grad))


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-4)])
def test_sixteen_thousand_tokens_take_no_square_of_memory(dtype, bound, device, host_generator, close, note):
    """One sequence of 16,384 tokens, 32 heads of 128 over 4 of keys; all scores would take 17 GB in bfloat16."""
    layout = layout_of(16384)
    (query, key, value), upstream = inputs(layout, 32, 4, 128, dtype, device, host_generator)
    params = packed_seq_params(layout, device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = layer()(query, key, value, None, packed_seq_params=params)
    output.backward(upstream)
    peak = torch.cuda.max_memory_allocated() - before
    note(**{f"peak bytes, {dtype}": peak})
    assert peak < 20 * query.nbytes, f"{peak / 2**30:.2f} GiB for queries of {query.nbytes / 2**30:.2f} GiB"
    # The last queries of the first heads, which see every key, in float64.
    for head in (0, 31):
        q = query[-64:, head].detach().double()
        k, v = (each[:, head // 8].detach().double() for each in (key, value))
        scores = q @ k.t() / 128**0.5
        later = torch.arange(16384, device=device) > torch.arange(16320, 16384, device=device)[:, None]
        expected = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        close(f"head {head}", output.view(-1, 32, 128)[-64:, head], expected, bound)
