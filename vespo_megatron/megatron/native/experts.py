"""Experts of one rank as two stacked weights and one grouped SwiGLU, instead of a module per expert.

Tokens come sorted by expert. On a GPU the products are `torch._grouped_mm`; on the host they are one `mm` per expert
into its rows of one output (measured no slower there than `_grouped_mm` or padded `bmm`, and it pads nothing). The
backward is written out: it keeps the input and the first product only, and adds the weights' gradients straight into
megatron-core's `main_grad` where there is one; on a GPU by a kernel of its own (`native.triton_outer`).
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    _initialize_affine_weight_gpu,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from vespo_megatron.losses.sequence import has_triton
from vespo_megatron.megatron.parameter_marks import marks

_ALIGNMENT = 16
"""Bytes; of `torch._grouped_mm`'s strides."""


class _HostCopy:
    """A tensor's values on the host: the copy is asked for now, and waited for where they are first read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._values = tensor
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def tolist(self) -> list[int]:
        """The values."""
        if self._done is not None:
            self._done.synchronize()
        return self._values.tolist()


class _Groups:
    """Rows of a sorted tensor `like` by expert: `tokens_per_expert` int [E] on either side, `weights` [E, H, F]."""

    def __init__(self, tokens_per_expert: torch.Tensor, like: torch.Tensor, weights: torch.Tensor) -> None:
        # Nobody promises anything of no rows; grouped products take bfloat16 alone, in rows of whole 16 bytes.
        on_device = like.device.type != "cpu" and len(like) > 0
        aligned = all(size * like.element_size() % _ALIGNMENT == 0 for size in weights.shape[1:])
        self.grouped = on_device and like.dtype is torch.bfloat16 and aligned
        self.adds = on_device and like.element_size() == 2 and has_kernels(like)
        if on_device:
            self.ends = tokens_per_expert.to(like.device, non_blocking=True).cumsum(0, dtype=torch.int32)
        if not (self.grouped and self.adds):
            # The forward does not wait for it, and the backward comes when it has long been there.
            self._counts = _HostCopy(tokens_per_expert)

    @cached_property
    def slices(self) -> list[tuple[int, slice]]:
        """The experts that have rows, and which."""
        ends = list(accumulate(self._counts.tolist()))
        rows = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        return [(expert, here) for expert, here in enumerate(rows) if here.stop > here.start]

    def product(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """rows [T, K] by their expert's weight in [E, K, N] → [T, N]."""
        if self.grouped:
            return torch._grouped_mm(rows, weights, offs=self.ends)
        result = rows.new_empty(rows.shape[0], weights.shape[2])
        for expert, here in self.slices:
            torch.mm(rows[here], weights[expert], out=result[here])
        return result

    def add_outer(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """total [E, M, N] += leftᵀ·right over each expert's rows, left [T, M], right [T, N]."""
        if self.adds:
            from vespo_megatron.megatron.native import triton_outer

            triton_outer.add_outer(total, left, right, self.ends)
            return
        if self.grouped and total.dtype == left.dtype:
            total.add_(torch._grouped_mm(left.t(), right, offs=self.ends))
            return
        for expert, here in self.slices:
            if total.dtype == left.dtype:
                total[expert].addmm_(left[here].t(), right[here])
            elif left.device.type != "cpu":
                mine = total[expert]
                torch.addmm(mine, left[here].t(), right[here], out_dtype=total.dtype, out=mine)
            else:
                total[expert].add_(left[here].t() @ right[here])


class _GroupedSwiGLU(torch.autograd.Function):
    """x [T, H], probs [T], fc1 [E, 2F, H] (gate above up), fc2 [E, H, F] → [T, H]: fc2 · (probs · silu(gate) · up)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        probs: torch.Tensor,
        fc1: torch.Tensor,
        fc2: torch.Tensor,
        tokens_per_expert: torch.Tensor,
    ) -> torch.Tensor:
        groups = _Groups(tokens_per_expert, x, fc2)
        gate_up = groups.product(x, fc1.transpose(1, 2))
        active = swiglu(gate_up, probs)
        ctx.save_for_backward(x, probs, gate_up, fc1, fc2)
        ctx.groups = groups
        return groups.product(active, fc2.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, probs, gate_up, fc1, fc2 = ctx.saved_tensors
        groups, gradient = ctx.groups, gradient.contiguous()
        active, gate_up_gradient, probs_gradient = swiglu_gradient(gate_up, probs, groups.product(gradient, fc2))
        fc2_gradient = _weight_gradient(groups, fc2, gradient, active) if ctx.needs_input_grad[3] else None
        del active
        fc1_gradient = _weight_gradient(groups, fc1, gate_up_gradient, x) if ctx.needs_input_grad[2] else None
        x_gradient = groups.product(gate_up_gradient, fc1) if ctx.needs_input_grad[0] else None
        return x_gradient, probs_gradient, fc1_gradient, fc2_gradient, None


def swiglu(gate_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """[T, 2F] (gate beside up), [T] → [T, F]: probs · silu(gate) · up."""
    if has_kernels(gate_up):
        from vespo_megatron.megatron.native import triton_experts

        return triton_experts.swiglu(gate_up, probs)
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate).mul_(up).mul_(probs[:, None].to(gate_up.dtype))


def swiglu_gradient(
    gate_up: torch.Tensor, probs: torch.Tensor, slope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`swiglu` once more, and the gradients of `gate_up` and `probs`; `slope` [T, F] is its result's, written over."""
    if has_kernels(gate_up):
        from vespo_megatron.megatron.native import triton_experts

        return triton_experts.swiglu_gradient(gate_up, probs, slope)
    gate, up = gate_up.chunk(2, dim=1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    active = silu * up
    probs_gradient = (slope * active).sum(1, dtype=torch.promote_types(slope.dtype, torch.float32)).to(probs.dtype)
    scale = probs[:, None].to(slope.dtype)
    slope.mul_(scale)
    gate_up_gradient = torch.empty_like(gate_up)
    gate_gradient, up_gradient = gate_up_gradient.chunk(2, dim=1)
    torch.mul(slope, silu, out=up_gradient)
    # silu' = sigmoid + silu · (1 − sigmoid)
    torch.mul(sigmoid.addcmul_(silu, 1 - sigmoid).mul_(up), slope, out=gate_gradient)
    return active.mul_(scale), gate_up_gradient, probs_gradient


def has_kernels(rows: torch.Tensor) -> bool:
    """Whether `native.triton_experts` has them for such rows."""
    return has_triton(rows.device.type) and rows.dtype is not torch.float64


def _weight_gradient(
    groups: _Groups, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor | None:
    """leftᵀ·right per expert, in the weight's shape: into `main_grad` (autograd then gets an unwritten tensor)."""
    if getattr(weight, "main_grad", None) is None:
        total = torch.zeros_like(weight)
        groups.add_outer(total, left, right)
        return total
    groups.add_outer(marks(weight).main_grad, left, right)
    marks(weight).grad_added_to_main_grad = True
    return torch.empty_like(weight)


class GroupedExperts(MegatronModule):
    """This rank's experts. Parameters, E local experts, F the width of this expert tensor parallel rank:

    `linear_fc1_weight` [E, 2F, H] (gate above up), `linear_fc2_weight` [E, H, F].
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        width = config.moe_ffn_hidden_size // self.tp_group.size()
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        fc1 = torch.empty(num_local_experts, 2 * width, config.hidden_size, **options)
        fc2 = torch.empty(num_local_experts, config.hidden_size, width, **options)
        self.linear_fc1_weight, self.linear_fc2_weight = torch.nn.Parameter(fc1), torch.nn.Parameter(fc2)
        for parameter, initialise, dim in (
            (self.linear_fc1_weight, config.init_method, 1),
            (self.linear_fc2_weight, config.output_layer_init_method, 2),
        ):
            if config.perform_initialization:
                _initialize_affine_weight_gpu(parameter, initialise, partition_dim=dim, is_expert=True)
            else:
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
            marks(parameter).allreduce = False  # sum over expert data parallel ranks, not data parallel ones

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """[T, H] sorted by expert, how many tokens each has, their gates [T] → [T, H] (this width's part), no bias."""
        output = _GroupedSwiGLU.apply(
            permuted_local_hidden_states,
            permuted_probs,
            self.linear_fc1_weight,
            self.linear_fc2_weight,
            tokens_per_expert,
        )
        return output, None

    def backward_dw(self) -> None:
        """megatron-core's delayed weight gradients: none are delayed."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """Both weights as slices of [experts, …], under `SequentialMLP`'s keys and shapes (experts.py:935).

        Gate and up are sharded apart, so that expert parallel and expert tensor parallel sizes may change.
        """
        del metadata  # these two weights are stored one way
        axis = len(sharded_offsets)
        experts = (axis, self.ep_group.rank(), self.ep_group.size())
        rank, size = self.tp_group.rank(), self.tp_group.size()
        replica = (0, 0, self.dp_group.rank())

        def shard(key: str, tensor: torch.Tensor, replica_id: Any, *offsets: tuple[int, int, int]) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                key, tensor, *sharded_offsets, experts, *offsets, replica_id=replica_id, prepend_axis_num=axis
            )

        def build(key: str, tensor: torch.Tensor, replica_id: Any, _flattened_range: Any = None) -> list[ShardedTensor]:
            return [
                shard(key, half.contiguous(), replica_id, (axis + 1, part * size + rank, 2 * size))
                for part, half in enumerate(tensor.chunk(2, dim=1))
            ]

        def merge(halves: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(halves, dim=1)

        fc1, fc2 = f"{prefix}experts.linear_fc1.weight", f"{prefix}experts.linear_fc2.weight"
        return {
            f"{prefix}linear_fc1_weight": ShardedTensorFactory(fc1, self.linear_fc1_weight, build, merge, replica),
            f"{prefix}linear_fc2_weight": shard(fc2, self.linear_fc2_weight, replica, (axis + 2, rank, size)),
        }
