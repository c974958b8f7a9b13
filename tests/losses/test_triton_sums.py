"""The loss's GPU kernels: in Triton's interpreter against the host's sums, and compiled for an H100.

`make test-triton` installs Triton.
"""

import pytest
from triton_process import compile_for_h100, interpret

CHECK = """
import torch
from vespo_megatron.losses import triton_sums
from vespo_megatron.losses.ratio_sums import ratio_sums, expand
from vespo_megatron.losses.sequence import PackedSequences

generator = torch.Generator().manual_seed(0)
for lengths in ([0, 1, 1023, 1024, 1025, 0, 20000], [3], [0, 0]):
    for dtype in (torch.float32, torch.float64):
        for masked in (False, True):
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
            tokens = int(cu_seqlens[-1])
            log_probs = torch.randn(tokens, generator=generator, dtype=dtype)
            anchor = log_probs + 30 * torch.randn(tokens, generator=generator, dtype=dtype)
            mask = torch.rand(tokens, generator=generator) < 0.7 if masked else None
            if masked and tokens > 5:
                log_probs[~mask] = float("nan")
            elif tokens > 5:
                log_probs[4] = float("nan")
            sequences = PackedSequences(cu_seqlens, tokens, torch.device("cpu"))
            wanted = ratio_sums(sequences, log_probs, anchor, mask, 20.0)
            found = triton_sums.sums(log_probs, anchor, mask, cu_seqlens, max(lengths), 20.0)
            again = triton_sums.sums(log_probs, anchor, mask, cu_seqlens, max(lengths), 20.0)
            assert torch.equal(found.nan_to_num(7.0), again.nan_to_num(7.0))
            exact = 1e-12 if dtype == torch.float64 else 1e-5
            for ours, host in zip(found, (wanted.log_probs, wanted.raw, wanted.clamped), strict=True):
                torch.testing.assert_close(ours, host, rtol=exact, atol=exact * 1000, equal_nan=True)
            values = torch.randn(len(lengths), generator=generator, dtype=dtype)
            for out in {torch.float32: (dtype, torch.bfloat16), torch.float64: (dtype,)}[dtype]:
                spread = triton_sums.expand(values, mask, cu_seqlens, max(lengths), tokens, out)
                torch.testing.assert_close(spread, expand(sequences, values, mask, out))
"""


@pytest.mark.triton
def test_kernels_equal_the_host_path():
    interpret(CHECK)


@pytest.mark.triton
def test_kernels_compile_for_an_h100(tmp_path):
    kernels = []
    for element in ("fp32", "fp64"):
        for has_mask in (True, False):
            given = {"mask": "*i1", "offsets": "*i64", "out": f"*{element}"}
            constants = {"HAS_MASK": has_mask, "SPAN": 8192, "BLOCK": 1024}
            summed = given | {"log_probs": f"*{element}", "anchor": f"*{element}", "bound": "fp32"}
            summed |= {"num_sequences": "i32"}
            kernels.append(("_sum_kernel", summed, constants | {"DTYPE": f"float{element[2:]}"}))
            kernels.append(("_expand_kernel", given | {"values": f"*{element}"}, constants))
    compile_for_h100("vespo_megatron.losses.triton_sums", kernels, str(tmp_path))
