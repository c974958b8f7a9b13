"""`vocab_parallel_log_probs` with either set of tile operations against a masked log-softmax in float64."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from vespo_megatron.data.sampling_mask import SamplingMask
from vespo_megatron.megatron import logit_tiles, logprobs
from vespo_megatron.megatron.logit_mask import LogitMask

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
"""A tensor parallel group of one."""
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
"""Of values and gradients. bfloat16: logits are rounded to 2⁻⁹ of themselves, and so are their gradients."""


@pytest.fixture(params=["plain", pytest.param("triton", marks=pytest.mark.cuda)])
def tiles(request) -> ModuleType:
    if request.param == "plain":
        return logit_tiles
    from vespo_megatron.megatron import triton_tiles

    return triton_tiles


def reference(hidden, weight, targets, temperature, allowed, gradient):
    """[log-probs, entropies], and the gradients of hidden and weight, in float64."""
    hidden, weight = (each.detach().double().requires_grad_() for each in (hidden, weight))
    logits = hidden @ weight.t() / temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    distribution = logits.log_softmax(-1)
    entropy = -(distribution.exp() * distribution.masked_fill(distribution == -torch.inf, 0.0)).sum(-1)
    answer = torch.stack([distribution.gather(-1, targets[:, None])[:, 0], entropy])
    return answer.detach(), *torch.autograd.grad(answer, (hidden, weight), gradient.double())


def truncated(targets: torch.Tensor, vocab: int, device) -> tuple[LogitMask, torch.Tensor]:
    """Two rows of three were drawn from a few tokens only, some of them from one."""
    lists = [[] if row % 3 == 0 else [token, *range(row % 7)] for row, token in enumerate(targets.tolist())]
    mask = SamplingMask.of([np.unique(each) for each in lists])
    allowed = torch.from_numpy(mask.counts == 0)[:, None].repeat(1, vocab)
    allowed[torch.from_numpy(mask.owners), torch.from_numpy(mask.ids).long()] = True
    return LogitMask.of(mask, device), allowed.to(device)


def compare(
    tiles, device, generator, close, *, rows, vocab, hidden_size, dtype, memory, temperature=0.7, mask=False, fuse=False
):
    padding = 3
    hidden = torch.randn(rows, hidden_size, generator=generator).to(device, dtype).requires_grad_()
    weight = 2 * hidden_size**-0.5 * torch.randn(vocab + padding, hidden_size, generator=generator)
    weight[vocab:] = 50.0  # would win every softmax it took part in
    weight = weight.to(device, dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    gradient = torch.randn(2, rows, generator=generator).to(device, torch.promote_types(dtype, torch.float32))
    logit_mask, allowed = truncated(targets, vocab, device) if mask else (None, None)
    targets = targets.to(device)
    if fuse:
        weight.main_grad = torch.ones(weight.shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
    with patch.object(logprobs, "operations", lambda device: tiles):
        answer = logprobs.vocab_parallel_log_probs(
            hidden,
            weight,
            targets,
            first_id=0,
            group=ALONE,
            vocab_size=vocab,
            temperature=temperature,
            memory_bytes=memory,
            logit_mask=logit_mask,
            fuse_gradient_accumulation=fuse,
        )
        answer.backward(gradient)
    wanted, of_hidden, of_weight = reference(hidden, weight[:vocab], targets, temperature, allowed, gradient)
    bound = BOUNDS[dtype]
    assert answer.dtype == torch.promote_types(dtype, torch.float32)
    close("log-probs", answer[0], wanted[0], bound)
    close("entropies", answer[1], wanted[1], bound)
    close("gradient of hidden", hidden.grad, of_hidden, bound)
    assert fuse == getattr(weight, "grad_added_to_main_grad", False)
    found = weight.main_grad - 1 if fuse else weight.grad
    # One is added and taken away again: float32 keeps 6e-8 of it, which small gradients feel.
    close("gradient of weight", found[:vocab], of_weight, max(bound, 5e-5) if fuse else bound)
    assert not found[vocab:].any(), "padding has a gradient"


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", [1, 10, 131])
@pytest.mark.parametrize("memory", [1 << 12, 1 << 22])
def test_values_and_gradients_are_those_of_the_formula(tiles, memory, rows, dtype, device, generator, close):
    compare(tiles, device, generator, close, rows=rows, vocab=1001, hidden_size=24, dtype=dtype, memory=memory)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_what_sampling_left_out_takes_no_part(tiles, dtype, device, generator, close):
    for memory in (1 << 12, 1 << 22):
        given = dict(rows=40, vocab=523, hidden_size=16, dtype=dtype, memory=memory)
        compare(tiles, device, generator, close, mask=True, **given)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_weights_gradient_is_added_to_main_grad(tiles, dtype, device, generator, close):
    for memory in (1 << 12, 1 << 22):
        given = dict(rows=70, vocab=523, hidden_size=16, dtype=dtype, memory=memory, temperature=1.0)
        compare(tiles, device, generator, close, fuse=True, **given)


def test_no_rows(tiles, device, generator):
    hidden = torch.zeros(0, 16, device=device, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator).to(device).requires_grad_()
    with patch.object(logprobs, "operations", lambda device: tiles):
        answer = logprobs.vocab_parallel_log_probs(
            hidden, weight, torch.zeros(0, dtype=torch.long, device=device), first_id=0, group=ALONE
        )
        answer.sum().backward()
    assert answer.shape == (2, 0) and not weight.grad.any()


@pytest.mark.cuda
@pytest.mark.parametrize("fuse", [False, True])
def test_the_vocabulary_of_qwen3(tiles, fuse, device, generator, close):
    """151,936 tokens, hidden 2,048, bfloat16; several tiles in both directions."""
    count, vocab, memory = 4100, 151_936, 1 << 28
    hidden = torch.randn(count, 2048, generator=generator).to(device, torch.bfloat16).requires_grad_()
    weight = (0.05 * torch.randn(vocab, 2048, device=device)).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab, (count,), generator=generator).to(device)
    gradient = torch.randn(2, count, generator=generator).to(device)
    if fuse:
        weight.main_grad = torch.zeros(weight.shape, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with patch.object(logprobs, "operations", lambda device: tiles):
        answer = logprobs.vocab_parallel_log_probs(
            hidden,
            weight,
            targets,
            first_id=0,
            group=ALONE,
            temperature=0.9,
            memory_bytes=memory,
            fuse_gradient_accumulation=fuse,
        )
        forward = torch.cuda.max_memory_allocated() - before
        answer.backward(gradient)
    # Some of them at a time, in float32: all logits would take 2.5 GB, their float64 twice that.
    leaves = [each.detach().float().requires_grad_() for each in (hidden, weight)]
    for rows in torch.arange(count, device=device).split(1025):
        logits = leaves[0][rows] @ leaves[1].t() / 0.9
        distribution = logits.log_softmax(-1)
        wanted = torch.stack(
            [distribution.gather(-1, targets[rows, None])[:, 0], -(distribution.exp() * distribution).sum(-1)]
        )
        close(f"values of rows from {int(rows[0])}", answer[:, rows], wanted, 2e-3)
        wanted.backward(gradient[:, rows])
    close("gradient of hidden", hidden.grad, leaves[0].grad, 1.5e-2)
    close("gradient of weight", weight.main_grad if fuse else weight.grad, leaves[1].grad, 1.5e-2)
    assert forward < 2.5 * memory, f"the forward took {forward / 2**20:.0f} MiB beside its input"


def test_both_sets_of_operations_see_a_nan(tiles, device, generator):
    logits = torch.randn(2, 5000, generator=generator).to(device)
    logits[1, 4321] = float("nan")
    statistics, target = torch.full((3, 2), 9.0, device=device), torch.full((2,), 9.0, device=device)
    column = torch.tensor([7, -3], device=device)
    tiles.softmax_statistics(logits.clone(), column, 1.0, statistics, target, kept=True)
    assert statistics[:, 0].isfinite().all() and statistics[1, 1].isnan()
    assert target[0] == logits[0, 7] and target[1] == 9.0
