"""Weights of this rank rounded for the length of a pass, exactly as the rollout engine's are, and brought back after.

The quantiser knows whole Hugging Face tensors, a rank has shards of several joined into one parameter. So a parameter's
shards are gathered over its tensor parallel ranks, taken apart by the exporter's own rule, rounded, and put together
again: blocks and groups lie where they lie on the way to the engine, whatever the layout. One parameter is whole at a
time. Gradients of such a pass are taken at the rounded weights and added to those of the weights that are kept:
straight-through (arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.megatron.hf_weights import LocalParameter, local_parameters
from vespo_megatron.megatron.host_weights import HostWeights
from vespo_megatron.megatron.parallel import RankInfo
from vespo_megatron.megatron.parameter_gather import finish_parameter_gather
from vespo_megatron.quantization import WeightQuantizer

# isort: split
from megatron.core import parallel_state


class RoundedWeights:
    """See the module. Use it on every rank alike."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        shape: ModelShape,
        rank_info: RankInfo,
        quantizer: WeightQuantizer,
    ) -> None:
        self._chunks, self._quantizer = chunks, quantizer
        self._local = [
            local
            for local in local_parameters(chunks, shape, rank_info)
            if any(quantizer.takes(name, local.parameter.dim()) for name in local.rule.names)
        ]
        self._kept: HostWeights | None = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block this rank has rounded weights; its own come back to the last bit, whatever happens.

        A collective: over data parallel ranks where a parameter gather is unfinished, and over tensor parallel ones.
        """
        finish_parameter_gather(self._chunks)
        own = [local.parameter.detach() for local in self._local]
        kept = self._kept = self._kept or HostWeights(own)
        kept.copy_from(own)
        try:
            for local, weight in zip(self._local, own, strict=True):
                weight.copy_(self._rounded(local))
            yield
        finally:
            kept.copy_to(own)

    @torch.no_grad()
    def _rounded(self, local: LocalParameter) -> torch.Tensor:
        """What this rank holds of it when its whole tensors are rounded."""
        whole = local.rule.merge(_all_shards(local))
        rounded = [self._quantizer.rounded(name, tensor) for name, tensor in zip(local.rule.names, whole, strict=True)]
        return local.rule.shard(rounded, local.shard, local.num_shards)


def _all_shards(local: LocalParameter) -> list[torch.Tensor]:
    """The parameter's shards in order, this rank's among them."""
    own = local.parameter.detach()
    if local.num_shards == 1:
        return [own]
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if local.rule.is_expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    shards = [torch.empty_like(own) for _ in range(local.num_shards)]
    dist.all_gather(shards, own, group=group)
    return shards
