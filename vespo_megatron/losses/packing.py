"""Padded `[batch, length]` tensors as the packed ones a policy loss takes, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.one_line import OneLine


@dataclass(frozen=True, repr=False)
class Packed(OneLine):
    """Padded tensors without their padding: the tokens where the mask is true, row after row."""

    values: tuple[Tensor, ...]
    """[tokens] each, in the order given to `pack`; differentiable."""
    cu_seqlens: Tensor
    """int64 [batch + 1] in host memory: row i holds `values[…][cu_seqlens[i]:cu_seqlens[i + 1]]`, nothing if empty."""
    index: Tensor
    """int64 [tokens]: where each token is in the padded tensors, read row by row."""
    shape: tuple[int, int]
    """(batch, length) of the padded tensors."""

    def unpack(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """`values [tokens]` in their places, `fill` elsewhere: [batch, length], differentiable.

        Raises:
            UserError: not one value per packed token.
        """
        if not isinstance(values, Tensor) or values.shape != self.index.shape:
            found = f"has shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"is a {_type(values)}"
            raise UserError(found, where="values", expected=f"[{len(self.index)}], one per packed token")
        batch, length = self.shape
        padded = values.new_full((batch * length,), fill)
        return padded.index_copy(0, self.index, values).view(batch, length)


def pack(values: Tensor, mask: Tensor, *more: Tensor) -> Packed:
    """Drop everything that the mask leaves out, from one padded tensor or from several.

    Padding may be left, right or both; what the mask leaves out in the middle of a response (a tool's reply) is dropped
    as well, so the packed tokens need no mask. A row without a token stays, as an empty sequence: advantages keep their
    places. Waits for the device.

    Args:
        values: [batch, length], as in log π_θ; gradients flow back into it, 0 where masked.
        mask: bool [batch, length]: the tokens to train on.
        more: [batch, length] each: what else goes with the tokens (log μ, log π_old, advantages per token).

    Raises:
        UserError: what is no tensor, or of another shape, type or device than it should be.
    """
    if not isinstance(mask, Tensor):
        raise UserError(f"is a {_type(mask)}", where="mask", expected="a bool tensor [batch, length]")
    if mask.dtype != torch.bool:
        raise UserError(
            f"is of {mask.dtype}: a token is trained on or it is not",
            where="mask",
            expected="a tensor of bool",
            fix="mask.bool(), or mask > 0.5; tensors to pack beside the first come after the mask",
        )
    if mask.dim() != 2:
        raise UserError(f"has shape {tuple(mask.shape)}", where="mask", expected="[batch, length]")
    tensors = (values, *more)
    for number, tensor in enumerate(tensors):
        where = "values" if number == 0 else f"more[{number - 1}]"
        if not isinstance(tensor, Tensor):
            raise UserError(f"is a {_type(tensor)}", where=where, expected="a tensor [batch, length]")
        if tensor.shape != mask.shape:
            raise UserError(
                f"has shape {tuple(tensor.shape)}",
                where=where,
                expected=f"{list(mask.shape)}, as mask",
                fix="advantages per response need no packing: rows keep their order",
            )
        if tensor.device != mask.device:
            raise UserError(f"is on {tensor.device}", where=where, expected=f"{mask.device}, where mask is")
    index = mask.flatten().nonzero().squeeze(1)
    batch, length = mask.shape
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int64)
    cu_seqlens[1:] = mask.sum(1).cumsum(0)
    return Packed(
        values=tuple(tensor.flatten().index_select(0, index) for tensor in tensors),
        cu_seqlens=cu_seqlens,
        index=index,
        shape=(batch, length),
    )


def _type(value: object) -> str:
    return type(value).__name__
