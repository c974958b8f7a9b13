"""Stand-in for pytorch/cpp_extensions/gemm.py:35: one product of two matrices, as cuBLAS orders them."""

from __future__ import annotations

import torch

calls: list[str] = []
"""The layout of every product, for tests."""


def general_gemm(
    A: torch.Tensor,
    B: torch.Tensor,
    workspace: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    *,
    layout: str = "TN",
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    grad: bool = False,
    **_rest: object,
):
    """Columns first, as cuBLAS has it: op(B) · op(A) in PyTorch's order of rows."""
    assert workspace is not None and out is None and bias is None
    calls.append(layout)
    left = B.t() if layout[1] == "T" else B
    right = A.t() if layout[0] == "T" else A
    return [torch.mm(left.to(out_dtype), right.to(out_dtype)), None, None, None]
