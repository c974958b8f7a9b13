"""The log-probs' GPU kernels: in Triton's interpreter against the host's operations, and compiled for an H100.

`make test-triton` installs Triton.
"""

import pytest
from triton_process import compile_for_h100, interpret

CHECK = """
import tempfile
from unittest.mock import patch

import torch
import torch.distributed as dist

from vespo_megatron.megatron import logit_tiles, logprobs, triton_tiles

generator = torch.Generator().manual_seed(0)
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def same(one, other, dtype):
    torch.testing.assert_close(one, other, rtol=EXACT[dtype], atol=EXACT[dtype], equal_nan=True)


for rows, width in ((3, 1), (5, 1000), (2, 4096), (3, 9001)):
    for dtype in EXACT:
        accurate = torch.promote_types(dtype, torch.float32)
        for temperature in (1.0, 0.7):
            logits = (30 * torch.randn(rows, width, generator=generator)).to(dtype)
            logits[0, : width // 2] = -1e30
            column = torch.randint(-width, 2 * width, (rows,), generator=generator)
            column[-1] = width - 1
            found = {}
            for operations in (logit_tiles, triton_tiles):
                statistics, target = torch.zeros(3, 7, rows, dtype=accurate), torch.full((rows,), 9.0, dtype=accurate)
                operations.softmax_statistics(logits.clone(), column, temperature, statistics[:, 3], target, kept=False)
                kept = logits.clone()
                operations.softmax_statistics(kept, column, temperature, statistics[:, 5], target, kept=True)
                assert torch.equal(kept, logits) and torch.equal(statistics[:, 3], statistics[:, 5])
                found[operations] = statistics[:, 3], target
            for ours, host in zip(found[triton_tiles], found[logit_tiles], strict=True):
                same(ours, host, accurate)
            log_sum = found[logit_tiles][0][0] + found[logit_tiles][0][1].log()
            slopes = torch.randn(2, 11, generator=generator, dtype=accurate)[:, 4 : 4 + rows]
            for entropy in (None, torch.rand(rows, generator=generator, dtype=accurate)):
                turned = {}
                for operations in (logit_tiles, triton_tiles):
                    turned[operations] = logits.clone()
                    operations.logit_gradient_(turned[operations], column, temperature, log_sum, slopes, entropy)
                same(turned[triton_tiles], turned[logit_tiles], dtype)

logits = torch.randn(2, 10, generator=generator)
logits[1, 3] = float("nan")
statistics = torch.zeros(3, 2)
triton_tiles.softmax_statistics(logits, torch.zeros(2, dtype=torch.long), 1.0, statistics, torch.zeros(2), kept=True)
assert statistics[:, 0].isfinite().all() and statistics[1, 1].isnan()

with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    given = dict(first_id=0, group=dist.group.WORLD, vocab_size=49, temperature=0.7, memory_bytes=2000)
    answers = []
    for operations in (logit_tiles, triton_tiles):
        generator.manual_seed(1)
        hidden = torch.randn(10, 12, generator=generator, dtype=torch.float64).requires_grad_()
        weight = torch.randn(50, 12, generator=generator, dtype=torch.float64).requires_grad_()
        targets = torch.randint(0, 49, (10,), generator=generator)
        with patch.object(logprobs, "operations", lambda device: operations):
            answer = logprobs.vocab_parallel_log_probs(hidden, weight, targets, **given)
            answer.t().backward(torch.randn(10, 2, generator=generator, dtype=torch.float64))
        answers.append((answer, hidden.grad, weight.grad))
    for ours, host in zip(*answers[::-1], strict=True):
        same(ours, host, torch.float64)
    dist.destroy_process_group()
"""


@pytest.mark.triton
def test_kernels_equal_the_host_path():
    interpret(CHECK)


@pytest.mark.triton
def test_kernels_compile_for_an_h100(tmp_path):
    kernels = []
    for element, accurate in (("bf16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        exact = f"*{accurate}"
        fold = {"tile": f"*{element}", "column": "*i64", "statistics": exact, "target": exact}
        fold |= {"width": "i32", "between_statistics": "i32"}
        turn = {"tile": f"*{element}", "column": "*i64", "log_sum": exact, "slopes": exact, "entropy": exact}
        turn |= {"width": "i32", "between_slopes": "i32"}
        constants = {"TEMPERATURE": 0.7, "BLOCK": 2048, "DTYPE": f"float{accurate[2:]}"}
        kernels.append(("_softmax_statistics_kernel", fold, constants))
        kernels += [("_logit_gradient_kernel", turn, constants | {"WITH_ENTROPY": wanted}) for wanted in (True, False)]
    compile_for_h100("vespo_megatron.megatron.triton_tiles", kernels, str(tmp_path))
