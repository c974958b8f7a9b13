"""Rounding of a tensor to a number format, by blocks that share a scale where the format has one.

`x → round(x / scale) · scale`, with scale = amax / (the format's largest number) over a block. Scales and products are
float64 until the result is rounded to the tensor's own dtype. So a block's largest magnitude comes out as it went in,
and quantising twice is quantising once, to the last bit, in float32, bfloat16 and float16; kernels that keep float32
scales differ from this in the last bit of a float32. A block of zeros stays zeros. A block that holds an infinity or a
NaN has no scale and becomes NaN as a whole, so that nothing hides it; looking for one would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from vespo_megatron.errors import UserError

_CASTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_LEVELS = {f"int{bits}": 2 ** (bits - 1) - 1 for bits in (8, 6, 4, 3, 2)}
_FP8_MAX = 448.0
"""The largest number of float8 e4m3fn (arXiv 2209.05433)."""
FP8_BLOCK = 128
"""Rows and columns of a weight block, and channels of an activation's group (DeepSeek-V3, arXiv 2412.19437, 3.3.2)."""
FORMATS = (*_CASTS, "fp8_e4m3", *_LEVELS)
"""What a weight can be rounded to."""


def fake_quantize(tensor: torch.Tensor, scheme: str, group_size: int | None = None) -> torch.Tensor:
    """A weight as it is after `scheme`, in its own dtype and shape; a new tensor.

    `bfloat16` and `float16` round each number, to an infinity beyond their range. `fp8_e4m3` has a scale per block of
    128 × 128. `intN` has a scale per `group_size` numbers of a row and the levels ±(2^(N−1) − 1), half to even. Blocks
    at the edges are what is left of them.

    Args:
        tensor: floating point, [..., outputs, inputs]; leading dimensions, as of stacked experts, are matrices apart.
        scheme: one of `FORMATS`.
        group_size: of `intN`: neighbouring inputs that share a scale; None: a whole row.

    Raises:
        UserError: another scheme, a `group_size` below 1 or where the scheme has none, a tensor of whole numbers.
    """
    _check(tensor, scheme, FORMATS)
    if group_size is not None and (scheme not in _LEVELS or group_size < 1):
        raise UserError(
            f"is {group_size} with {scheme}", where="group_size", expected=f"at least 1, with {', '.join(_LEVELS)}"
        )
    if scheme in _LEVELS:
        levels = _LEVELS[scheme]
        return _by_blocks(tensor, 1, group_size, levels, torch.round)
    if scheme == "fp8_e4m3":
        return _by_blocks(tensor, FP8_BLOCK, FP8_BLOCK, _FP8_MAX, _to_fp8)
    return tensor.to(_CASTS[scheme]).to(tensor.dtype)


def fake_quantize_tokens(hidden: torch.Tensor, scheme: str) -> torch.Tensor:
    """Activations [..., channels] as a linear layer of `scheme` reads them, in their own dtype.

    `bfloat16` and `float16` round each number; `fp8_e4m3` has a scale per token and group of 128 channels, as in
    DeepSeek-V3. Raises `UserError` for another scheme.
    """
    _check(hidden, scheme, (*_CASTS, "fp8_e4m3"))
    if scheme == "fp8_e4m3":
        return _by_blocks(hidden, 1, FP8_BLOCK, _FP8_MAX, _to_fp8)
    return hidden.to(_CASTS[scheme]).to(hidden.dtype)


def fake_quantize_cache(states: torch.Tensor, scheme: str) -> torch.Tensor:
    """Keys or values of any shape as a cache of `scheme` gives them back, in their own dtype.

    `fp8_e4m3` has no scale, as SGLang's cache where a checkpoint brings none, and stops at ±448. Raises `UserError` for
    another scheme than that and `bfloat16`.
    """
    _check(states, scheme, ("bfloat16", "fp8_e4m3"))
    if scheme == "fp8_e4m3":
        return _to_fp8(states.clamp(-_FP8_MAX, _FP8_MAX)).to(states.dtype)
    return states.to(_CASTS[scheme]).to(states.dtype)


def _check(tensor: torch.Tensor, scheme: str, known: tuple[str, ...]) -> None:
    if scheme not in known:
        raise UserError(f"is {scheme!r}", where="scheme", expected=f"one of {', '.join(known)}")
    if not tensor.is_floating_point():
        raise UserError(f"holds {str(tensor.dtype)[6:]}", where="tensor", expected="a floating-point dtype")


def _to_fp8(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.float().to(torch.float8_e4m3fn).to(numbers.dtype)


def _by_blocks(
    tensor: torch.Tensor,
    rows: int,
    columns: int | None,
    largest: float,
    rounded: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`rounded` of the tensor in units of its blocks' scales, a block `rows` × `columns` of the last two dimensions."""
    if not tensor.numel():
        return tensor.clone()
    height, width = (1, 1, *tensor.shape)[-2:]
    columns = min(columns or width, width)
    rows = min(rows, height)
    matrices = tensor.reshape(-1, height, width).double()
    padded = F.pad(matrices, (0, -width % columns, 0, -height % rows))
    blocks = padded.view(len(matrices), padded.shape[1] // rows, rows, padded.shape[2] // columns, columns)
    amax = blocks.abs().amax(dim=(2, 4), keepdim=True)
    # A GPU divides by a number as it multiplies by the rounded inverse; by a tensor it divides.
    scale = torch.where(amax == 0, 1.0, amax / torch.full_like(amax, largest))
    result = (rounded(blocks / scale) * scale).view_as(padded)[:, :height, :width]
    return result.to(tensor.dtype).reshape(tensor.shape)
