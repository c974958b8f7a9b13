"""Stand-in for pytorch/distributed.py: the collectives of a tensor parallel layer, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class CudaRNGStatesTracker:
    """megatron-core subclasses it; its own is used unless `use_te_rng_tracker` says otherwise."""


def is_fp8_activation_recompute_enabled() -> bool:
    return False


def activation_recompute_forward(*_args: Any, **_kwargs: Any):
    raise AssertionError("only recompute in FP8 asks for it")


def checkpoint(*_args: Any, **_kwargs: Any):
    raise AssertionError("only recompute in FP8 asks for it")


def size_of(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    whole = tensor.new_empty(group.size() * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(whole, tensor.contiguous(), group=group)
    return whole


def reduce_scatter(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    share = tensor.new_empty(tensor.shape[0] // group.size(), *tensor.shape[1:])
    dist.reduce_scatter_tensor(share, tensor.contiguous(), group=group)
    return share


def all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = tensor.clone().contiguous()
    dist.all_reduce(total, group=group)
    return total


def _with_gradient(forward: Any, backward: Any) -> Any:
    class Collective(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
            ctx.group = group
            return forward(tensor, group)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            return backward(gradient, ctx.group), None

    return Collective.apply


def _nothing(tensor: torch.Tensor, _group: dist.ProcessGroup) -> torch.Tensor:
    return tensor.clone()


gather_tokens = _with_gradient(gather, reduce_scatter)
scatter_sum = _with_gradient(reduce_scatter, gather)
copy_in = _with_gradient(_nothing, all_reduce)
sum_out = _with_gradient(all_reduce, _nothing)
