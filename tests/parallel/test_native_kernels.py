"""The native layers' GPU kernels: in Triton's interpreter against the host's operations, and compiled for an H100.

`make test-triton` installs Triton.
"""

import pytest
from triton_process import compile_for_h100, interpret

CHECK = """
import torch

from vespo_megatron.megatron.native import experts, triton_experts, triton_outer
from vespo_megatron.megatron.native.triton_rotary import rotate

torch.manual_seed(0)
EXACT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
BOUNDS = EXACT | {torch.float16: 2e-3}
near = {torch.float32: torch.float32, torch.bfloat16: torch.float16}


def same(ours, host, dtype):
    assert ours.dtype == host.dtype and ours.shape == host.shape
    torch.testing.assert_close(ours, host, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


for dtype in EXACT:
    for rows, width in ((1, 3), (37, 96), (8, 300)):
        gate_up, slope = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
        probs = torch.rand(rows)
        same(triton_experts.swiglu(gate_up, probs), experts.swiglu(gate_up, probs), dtype)
        found = triton_experts.swiglu_gradient(gate_up, probs, slope.clone())
        exact = experts.swiglu_gradient(gate_up.float(), probs, slope.float())
        for ours, host, kind in zip(found, exact, (dtype, dtype, torch.float32), strict=True):
            same(ours, host.to(kind), dtype)
    values, positions = torch.randn(40, 50).to(dtype), torch.randint(0, 40, (11, 4))
    same(triton_experts.sum_rows(values, positions), values[positions].float().sum(1).to(dtype), dtype)
    # Triton's interpreter multiplies the bits of bfloat16 numbers, not what they stand for.
    for m, n in ((24, 16), (130, 200)):
        counts = torch.tensor([3, 0, 70, 1, 0])
        left, right = (torch.randn(74, width).to(near[dtype]) for width in (m, n))
        for kept in (torch.float32, near[dtype]):
            total = torch.randn(5, m, n).to(kept)
            pairs = zip(left.float().split(counts.tolist()), right.float().split(counts.tolist()), strict=True)
            exact = total.float() + torch.stack([a.t() @ b for a, b in pairs])
            triton_outer.add_outer(total, left, right, counts.cumsum(0, dtype=torch.int32))
            same(total, exact.to(kept), kept)
    for heads in (1, 3, 4):
        whole = torch.randn(9, heads + 2, 16).to(dtype)
        x = whole[:, 1 : heads + 1].detach().requires_grad_()
        angles = 9 * torch.rand(9, 8)
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        wide = cos[:, None], sin[:, None]
        exact = torch.cat([first * wide[0] - second * wide[1], second * wide[0] + first * wide[1]], dim=-1).to(dtype)
        gradient = torch.randn(9, heads, 16).to(dtype)
        turned = rotate(x, cos, sin)
        same(turned, exact, dtype)
        same(*(torch.autograd.grad(y, x, gradient)[0] for y in (turned, exact)), dtype)
"""


@pytest.mark.triton
def test_kernels_equal_the_host_path():
    interpret(CHECK)


@pytest.mark.triton
def test_kernels_compile_for_an_h100(tmp_path):
    wide = dict.fromkeys(("gate_up", "out", "slope", "active", "gate_up_gradient", "rows"), "*bf16")
    exact = {"probs": "*fp32", "probs_gradient": "*fp32", "positions": "*i64"}
    block = {"WIDTH": 768, "ROWS": 4, "COLUMNS": 256}
    experts = [
        ("_swiglu_kernel", wide | exact | {"rows": "i32"}, block),
        ("_swiglu_gradient_kernel", wide | exact | {"rows": "i32"}, block),
        ("_sum_rows_kernel", wide | exact, {"WIDTH": 2048, "COUNT": 8, "BLOCK": 2048}),
    ]
    compile_for_h100("vespo_megatron.megatron.native.triton_experts", experts, str(tmp_path))
    pointers = {"total": "*fp32", "left": "*bf16", "right": "*bf16", "ends": "*i32"}
    tiles = {"M": 1536, "N": 2048, "TILE_M": 128, "TILE_N": 128, "TILE_ROWS": 32}
    outer = [("_add_outer_kernel", pointers, tiles)]
    compile_for_h100("vespo_megatron.megatron.native.triton_outer", outer, str(tmp_path))
    types = {"x": "*bf16", "out": "*bf16", "cos": "*fp32", "sin": "*fp32", "stride_token": "i32", "stride_head": "i32"}
    constants = {"HEADS": 32, "BLOCK": 32, "HALF": 64, "SIGN": -1.0}
    rotary = [("_rotate_kernel", types, constants)]
    compile_for_h100("vespo_megatron.megatron.native.triton_rotary", rotary, str(tmp_path))
