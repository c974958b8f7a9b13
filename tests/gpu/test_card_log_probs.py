"""Log-probs, entropies and their gradients on the card against a float64 log-softmax; Triton's kernels and without."""

from __future__ import annotations

import math
import tempfile
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from vespo_megatron.data.sampling_mask import SamplingMask
from vespo_megatron.megatron import logit_tiles, logprobs
from vespo_megatron.megatron.logit_mask import LogitMask

BOUND = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIZES = {"one row": (1, 16, 50), "odd": (37, 64, 1003), "several tiles": (300, 64, 9001)}


@pytest.fixture(scope="module", autouse=True)
def world(device):
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def reference(hidden, weight, targets, allowed, temperature):
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    logits = (exact[0] @ exact[1].t() / temperature).masked_fill(~allowed, -torch.inf)
    distribution = logits.log_softmax(-1)
    entropy = -(distribution.exp() * distribution.masked_fill(~allowed, 0.0)).sum(-1)
    return torch.stack([distribution.gather(1, targets[:, None])[:, 0], entropy]), exact


def compare(size, dtype, truncated, device, generator, operations, fused=False):
    rows, width, vocabulary = size
    hidden = torch.randn(rows, width, device=device, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, device=device, generator=generator).mul_(width**-0.5).to(dtype)
    weight.requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device=device, generator=generator)
    slopes = torch.randn(2, rows, device=device, generator=generator)
    allowed, logit_mask = torch.ones(rows, vocabulary, dtype=torch.bool, device=device), None
    if truncated:
        lists = [[] if row % 3 == 0 else sorted({int(target), *range(row % 7)}) for row, target in enumerate(targets)]
        for row, kept in enumerate(lists):
            if kept:
                allowed[row] = False
                allowed[row, kept] = True
        logit_mask = LogitMask.of(SamplingMask.of(lists), device)
    wanted, exact = reference(hidden, weight, targets, allowed, 0.7)
    wanted.backward(slopes.double())
    if fused:
        weight.main_grad = torch.zeros(weight.shape, device=device)
    with patch.object(logprobs, "operations", operations):
        found = logprobs.vocab_parallel_log_probs(
            hidden,
            weight,
            targets,
            first_id=0,
            vocab_size=vocabulary,
            group=dist.group.WORLD,
            temperature=0.7,
            memory_bytes=1 << 20,
            logit_mask=logit_mask,
            fuse_gradient_accumulation=fused,
        )
        found.backward(slopes.to(found.dtype))
    pairs = {"log-probs": (found[0], wanted[0]), "entropies": (found[1], wanted[1])}
    pairs |= {"hidden": (hidden.grad, exact[0].grad)}
    pairs |= {"weight": (weight.main_grad if fused else weight.grad, exact[1].grad)}
    return {name: float((a.double() - b).norm() / b.norm()) for name, (a, b) in pairs.items()}


CHOSEN = logprobs.operations
WAYS = {"as the device has it": CHOSEN, "PyTorch's operations": lambda _: logit_tiles}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("truncated", [False, True], ids=["whole", "truncated"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_are_those_of_a_log_softmax(size, dtype, truncated, way, device, generator, note):
    # A single row's error is that of one rounded logit, now and then: their square mean over 32 of them.
    draws = max(1, 32 // SIZES[size][0])
    each = [compare(SIZES[size], dtype, truncated, device, generator, WAYS[way]) for _ in range(draws)]
    found = {name: math.sqrt(sum(draw[name] ** 2 for draw in each) / draws) for name in each[0]}
    note(**found)
    assert all(error < BOUND[dtype] for error in found.values()), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weight_s_gradient_goes_into_main_grad(dtype, device, generator):
    found = compare(SIZES["odd"], dtype, False, device, generator, CHOSEN, fused=True)
    assert all(error < BOUND[dtype] for error in found.values()), found


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_30b_s_vocabulary(way, dtype, device, generator, note):
    found = compare((300, 2048, 151936), dtype, False, device, generator, WAYS[way])
    note(**found)
    assert all(error < BOUND[dtype] for error in found.values()), found


@pytest.mark.cuda
@pytest.mark.parametrize("module", ["test_triton_tiles", "test_triton_sums"])
def test_kernels_equal_the_host_s_operations(module):
    """What the interpreter is asked on a CPU, asked of the card."""
    import importlib
    import sys
    from pathlib import Path

    folder = {"test_triton_tiles": "parallel", "test_triton_sums": "losses"}[module]
    sys.path[:0] = [str(Path(__file__).parents[1] / folder), str(Path(__file__).parents[1])]
    code = importlib.import_module(module).CHECK.split("with tempfile")[0]
    code = code.replace("torch.Generator()", 'torch.Generator("cuda")').replace(
        'torch.device("cpu")', 'torch.device("cuda")'
    )
    torch.set_default_device("cuda")
    try:
        exec(code, {})
    finally:
        torch.set_default_device(None)
