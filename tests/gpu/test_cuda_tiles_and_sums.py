"""The Triton kernels on the card against the same operations on the host: tiles of logits, sums over sequences."""

from __future__ import annotations

import pytest
import torch

from vespo_megatron.losses.ratio_sums import expand, ratio_sums
from vespo_megatron.losses.sequence import PackedSequences
from vespo_megatron.megatron import logit_tiles

pytestmark = pytest.mark.cuda
EXACT = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2}


def same(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    torch.testing.assert_close(
        one.cpu(),
        other.cpu(),
        rtol=EXACT[dtype],
        atol=EXACT[dtype],
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("rows", "width"), [(3, 1), (5, 1000), (2, 4096), (3, 9001), (257, 4097), (4099, 640)])
def test_tiles(rows, width, dtype, device, generator):
    from vespo_megatron.megatron import triton_tiles

    accurate = torch.promote_types(dtype, torch.float32)
    for temperature in (1.0, 0.7):
        logits = (30 * torch.randn(rows, width, generator=generator)).to(dtype)
        logits[0, : width // 2] = -1e30
        column = torch.randint(-width, 2 * width, (rows,), generator=generator)
        column[-1] = width - 1
        statistics, target = torch.full((3, 7, rows), 5.0, dtype=accurate), torch.full((rows,), 9.0, dtype=accurate)
        logit_tiles.softmax_statistics(logits.clone(), column, temperature, statistics[:, 3], target, kept=False)
        found, at = torch.full_like(statistics, 5.0, device=device), torch.full_like(target, 9.0, device=device)
        tile = logits.to(device)
        triton_tiles.softmax_statistics(tile, column.to(device), temperature, found[:, 3], at, kept=False)
        assert torch.equal(tile.cpu(), logits), "the kernel wrote to its input"
        same(found, statistics, accurate, f"statistics at temperature {temperature}")
        same(at, target, accurate, "the target's logit")
        log_sum = statistics[0, 3] + statistics[1, 3].log()
        slopes = torch.randn(2, rows + 8, generator=generator, dtype=accurate)[:, 4 : 4 + rows]
        for entropy in (None, torch.rand(rows, generator=generator, dtype=accurate)):
            host, tile = logits.clone(), logits.to(device)
            logit_tiles.logit_gradient_(host, column, temperature, log_sum, slopes, entropy)
            given = [each.to(device) for each in (column, log_sum)]
            wide = torch.zeros(2, rows + 8, dtype=accurate, device=device)
            wide[:, 4 : 4 + rows] = slopes.to(device)
            triton_tiles.logit_gradient_(
                tile,
                given[0],
                temperature,
                given[1],
                wide[:, 4 : 4 + rows],
                None if entropy is None else entropy.to(device),
            )
            same(tile, host, dtype, f"gradient, {'with' if entropy is not None else 'without'} entropy")


@pytest.mark.parametrize("lengths", [[0, 1, 1023, 1024, 1025, 0, 20000], [3], [0, 0], [131072, 8192, 8193], [1] * 999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_sums(lengths, dtype, masked, device, generator):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(cu_seqlens[-1])
    log_probs = torch.randn(tokens, generator=generator, dtype=dtype)
    anchor = log_probs + 30 * torch.randn(tokens, generator=generator, dtype=dtype)
    mask = torch.rand(tokens, generator=generator) < 0.7 if masked else None
    if masked and tokens > 5:
        log_probs[~mask] = float("nan")
    elif tokens > 5:
        log_probs[4] = float("nan")
    there = [None if each is None else each.to(device) for each in (log_probs, anchor, mask)]
    host = PackedSequences(cu_seqlens, tokens, torch.device("cpu"))
    here = PackedSequences(cu_seqlens, tokens, device)
    assert here.uses_triton, "the kernels are not used on this device"
    wanted = ratio_sums(host, log_probs, anchor, mask, 20.0)
    found, again = (ratio_sums(here, *there, 20.0) for _ in range(2))
    for name in ("log_probs", "raw", "clamped"):
        ours, host_sum = getattr(found, name), getattr(wanted, name)
        assert torch.equal(ours.nan_to_num(7.0), getattr(again, name).nan_to_num(7.0)), f"{name}: not the same twice"
        exact = 1e-12 if dtype is torch.float64 else 1e-5
        what = f"{name}: {{}}".format
        torch.testing.assert_close(ours.cpu(), host_sum, rtol=exact, atol=exact * 2000, equal_nan=True, msg=what)
    values = torch.randn(len(lengths), generator=generator, dtype=dtype)
    for out in {torch.float32: (dtype, torch.bfloat16), torch.float64: (dtype,)}[dtype]:
        spread = expand(here, values.to(device), there[2], out)
        assert torch.equal(spread.cpu(), expand(host, values, mask, out)), "expanded values differ"
