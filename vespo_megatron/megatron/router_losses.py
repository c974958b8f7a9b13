"""Losses of the routers themselves: load balancing and z-loss, each a mean over the real tokens of a whole update.

megatron-core has both (router.py:279, :456), per micro-batch: the mean over micro-batches of unlike size weighs their
tokens unlike, padding counts as tokens, and its `global_aux_loss` takes the experts' shares from a running average
over the micro-batches before (router.py:379). Here every token of an update counts alike, whatever the split, the
packing and the layout. With one micro-batch without padding the values are megatron-core's.

For one layer with E experts and K active ones, over tokens t with logits l_t and p_t = softmax(l_t), or σ(l_t) over
its sum where the router's scores are sigmoids:

- load balancing: E · Σ_e f_e · mean_t p_t[e], f_e the share of the K·T choices that expert e has. Its minimum is 1.
  `aux_loss` (Switch Transformer, arXiv 2101.03961) takes f from each micro-batch, `global_aux_loss` (arXiv 2501.11873)
  from the whole update, which takes a forward pass before it. f is of the routers' own top-k, also where other routes
  are replayed, and with the correction bias, which megatron-core leaves out here (moe_utils.py:788): what is balanced
  is what they would choose.
- z-loss: mean_t (log Σ_e exp l_t[e])² (ST-MoE, arXiv 2202.08906).

Their gradients enter through `MoEAuxLossAutoScaler`, beside that of the objective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from vespo_megatron.megatron.parallel import context_tensor_group, stage_group
from vespo_megatron.recipe.schema import MegatronConfig

# isort: split
# parallel has installed the CPU runtime before megatron-core is imported
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter


@dataclass(frozen=True)
class _Update:
    """The update at hand."""

    total: torch.Tensor
    """Its real tokens over all ranks of the stage, float32 [1] on the device."""
    scale: float
    """What the schedule and DDP divide a gradient by: micro-batches of this rank × data parallel ranks."""


class RouterLosses:
    """The losses of every router of this rank's model chunks.

    Args:
        kind: 'none', 'aux_loss' or 'global_aux_loss': where the experts' shares come from.
        balance: what the load balancing loss is multiplied with.
        z: what the z-loss is multiplied with.
        routers: in the order of the layers' columns.
        device: theirs.
    """

    def __init__(
        self, kind: str, balance: float, z: float, routers: Sequence[TopKRouter], device: torch.device
    ) -> None:
        self.kind, self.balance, self.z, self.device = kind, balance, z, device
        self.group, self.stage = context_tensor_group(), stage_group()
        experts = routers[0].num_experts if routers else 0
        self.routers = routers
        self._counts = torch.zeros(len(routers), experts, device=device)
        self._sums = torch.zeros(2, len(routers), device=device)
        self._update: _Update | None = None
        self._counting = False
        for column, router in enumerate(routers):
            # The one place a router has logits and padding together, in the forward and in a recomputation of it.
            router.routing = partial(self._routing, column, router.routing)

    @classmethod
    def from_recipe(
        cls, megatron: MegatronConfig, routers: Sequence[TopKRouter], device: torch.device
    ) -> RouterLosses | None:
        """A recipe's, for the routers of this rank; None where it has none."""
        balance, z = megatron.moe_aux_loss_coeff, megatron.moe_z_loss_coeff or 0.0
        if not balance and not z:
            return None
        return cls(megatron.moe_router_load_balancing_type, balance, z, routers, device)

    @property
    def needs_counts(self) -> bool:
        """Whether an update needs the experts' shares of all of its tokens before it begins."""
        return self.kind == "global_aux_loss"

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Within the block forward passes count what the routers choose; at its end the counts are the stage's."""
        self._counts.zero_()
        self._counting = True
        try:
            yield
        finally:
            self._counting = False
        self._reduce(self._counts, self.stage)

    @contextlib.contextmanager
    def update(self, is_real: Sequence[torch.Tensor], *, data_size: int) -> Iterator[None]:
        """Within the block forwards with gradient add the losses.

        Args:
            is_real: bool [rows] of each micro-batch of the update on this rank.
            data_size: data parallel ranks.
        """
        total = torch.stack([rows.sum() for rows in is_real]).sum().float().reshape(1)
        self._reduce(total, self.stage)
        self._sums.zero_()
        self._update = _Update(total.clamp(min=1), float(len(is_real) * data_size))
        try:
            yield
            self._sums /= self._update.total
        finally:
            self._update = None

    def values(self) -> torch.Tensor:
        """Load balancing and z-loss of the last update, [2, layers]: this rank's tokens' part of them."""
        return self._sums.clone()

    def _routing(self, column: int, choose: Any, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        if self._counting:
            self._counts[column] += self._choices(column, logits.flatten(0, -2), _real(padding_mask, logits))
        elif self._update is not None and torch.is_grad_enabled():
            flat = logits.flatten(0, -2)
            loss = self._loss(column, flat, _real(padding_mask, logits), self._update)
            logits = MoEAuxLossAutoScaler.apply(flat, loss).view_as(logits)
        return choose(logits, padding_mask=padding_mask)

    def _loss(self, column: int, logits: torch.Tensor, real: torch.Tensor, update: _Update) -> torch.Tensor:
        """This micro-batch's addend of the update's loss, [1]; `logits` [rows, experts], `real` float [rows]."""
        loss = logits.new_zeros(1, dtype=torch.float32)
        if self.balance:
            shares = self._shares(column, logits, real)
            chances = (self._chances(column, logits) * real[:, None]).sum(0)
            balance = logits.shape[-1] * (shares * chances).sum()
            self._sums[0, column] += balance.detach()
            loss = loss + self.balance * balance
        if self.z:
            z = (torch.logsumexp(logits.float(), dim=-1).square() * real).sum()
            self._sums[1, column] += z.detach()
            loss = loss + self.z * z
        return loss * (update.scale / update.total)

    def _shares(self, column: int, logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """f, [experts]."""
        counts = self._counts[column]
        if self.kind == "aux_loss":
            counts = self._choices(column, logits.detach(), real)
            self._reduce(counts, self.group)
        return counts / counts.sum().clamp(min=1)

    def _chances(self, column: int, logits: torch.Tensor) -> torch.Tensor:
        """p, float32 [rows, experts]."""
        if self.routers[column].score_function == "softmax":
            return torch.softmax(logits, dim=-1, dtype=torch.float32)
        scores = torch.sigmoid(logits.float())
        return scores / scores.sum(dim=-1, keepdim=True)

    def _choices(self, column: int, logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """How many tokens would choose each expert, float32 [experts]."""
        router = self.routers[column]
        scores = logits if router.expert_bias is None else torch.sigmoid(logits.float()) + router.expert_bias
        chosen = torch.topk(scores, router.topk, dim=-1).indices
        counts = torch.zeros(logits.shape[-1], device=self.device)
        return counts.scatter_add_(0, chosen.flatten(), real[:, None].expand_as(chosen).flatten())

    @staticmethod
    def _reduce(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        if group.size() > 1:
            dist.all_reduce(tensor, group=group)


def _real(padding_mask: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """Float32 [rows], 1 for tokens and 0 for padding."""
    if padding_mask is None:
        return torch.ones(logits.shape[:-1].numel(), device=logits.device)
    return (~padding_mask).flatten().float()
