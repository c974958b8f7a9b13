"""`vocab_parallel_log_probs` against plain log-softmax in float64: values, entropies and every gradient."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from vespo_megatron.data.sampling_mask import SamplingMask
from vespo_megatron.megatron.logit_mask import LogitMask
from vespo_megatron.megatron.logprobs import vocab_parallel_log_probs


def sharded(store: str, memory_bytes: int, rows: int, dtype: torch.dtype, fuse: bool, truncated: bool = False) -> dict:
    """One tensor parallel rank's errors; the shards are of unequal size and end in padding, some hold nothing else.

    `truncated`: two rows of three were drawn from a few tokens only, some of them from one.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 12, generator=generator, dtype=torch.float64).to(dtype).double()
    weight = torch.randn(50, 12, generator=generator, dtype=torch.float64).to(dtype).double()
    targets = torch.randint(0, 50, (rows,), generator=generator)
    gradient = torch.randn(2, rows, generator=generator, dtype=torch.float64)

    plain_hidden, plain_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = plain_hidden @ plain_weight.t() / 0.7
    logit_mask = None
    if truncated:
        lists = [[] if row % 3 == 0 else [token, *range(row % 7)] for row, token in enumerate(targets.tolist())]
        sampling_mask = SamplingMask.of([np.unique(each) for each in lists])
        logit_mask = LogitMask.of(sampling_mask, torch.device("cpu"))
        allowed = torch.from_numpy(sampling_mask.counts == 0)[:, None].repeat(1, 50)
        allowed[torch.from_numpy(sampling_mask.owners), torch.from_numpy(sampling_mask.ids).long()] = True
        logits = logits.masked_fill(~allowed, -torch.inf)
    distribution = logits.log_softmax(-1)
    entropy = -(distribution.exp() * distribution.masked_fill(distribution == -torch.inf, 0.0)).sum(-1)
    plain = torch.stack([distribution.gather(-1, targets[:, None])[:, 0], entropy])
    plain.backward(gradient)

    bounds = {1: [0, 50], 2: [0, 37, 50], 3: [0, 37, 50, 50]}[size]
    real = bounds[rank + 1] - bounds[rank]
    padding = torch.full((3, 12), 50.0, dtype=torch.float64)  # would win every softmax it took part in
    ours_hidden = hidden.to(dtype).requires_grad_()
    ours_weight = torch.cat([weight[bounds[rank] : bounds[rank + 1]], padding]).to(dtype).requires_grad_()
    ours_weight.main_grad = torch.ones(real + 3, 12, dtype=torch.promote_types(dtype, torch.float32))
    ours = vocab_parallel_log_probs(
        ours_hidden,
        ours_weight,
        targets,
        first_id=bounds[rank],
        vocab_size=real,
        group=dist.group.WORLD,
        temperature=0.7,
        memory_bytes=memory_bytes,
        logit_mask=logit_mask,
        fuse_gradient_accumulation=fuse,
    )
    kept = list(ours.grad_fn.kept.values())
    held = sum(tile.nbytes for tile in kept) + max((tile.nbytes for tile in kept), default=0)
    ours.backward(gradient.to(ours.dtype))
    hidden_gradient = ours_hidden.grad.double()
    dist.all_reduce(hidden_gradient)
    found = ours_weight.main_grad.double() - 1 if fuse else ours_weight.grad.double()
    wanted = torch.cat([plain_weight.grad[bounds[rank] : bounds[rank + 1]], torch.zeros(3, 12)])

    def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
        return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item() if len(actual) else 0.0

    return {
        "values": error(ours.double().t(), plain.t()),
        "hidden": error(hidden_gradient, plain_hidden.grad),
        "weight": error(found, wanted),
        "kept": float(held > memory_bytes or (rows > 0 and real > 0 and not kept) or len(ours.grad_fn.kept) > 0),
        "fused": float(fuse != getattr(ours_weight, "grad_added_to_main_grad", False)),
    }


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(("memory_bytes", "rows"), [(200, 10), (1 << 20, 10), (1 << 20, 4100), (200, 0)])
def test_log_probs_entropies_and_gradients_are_exact(world_size, memory_bytes, rows, truncated, workers):
    given = dict(memory_bytes=memory_bytes, rows=rows, truncated=truncated)
    for errors in workers.run(sharded, world_size, dtype=torch.float64, fuse=True, **given):
        assert max(errors.values()) < 1e-10, errors
    for errors in workers.run(sharded, world_size, dtype=torch.float32, fuse=False, **given):
        assert max(errors.values()) < 2e-6, errors


def test_bfloat16_is_exact_to_its_rounding(workers):
    """Relative to the largest entry; a plain log-softmax from bfloat16 logits is off by the same."""
    for truncated in (False, True):
        given = dict(memory_bytes=200, rows=10, dtype=torch.bfloat16, fuse=False, truncated=truncated)
        for errors in workers.run(sharded, 2, **given):
            assert max(errors.values()) < 3e-2, errors
