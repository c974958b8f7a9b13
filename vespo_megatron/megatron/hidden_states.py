"""What this rank's transformer layers hand on where tokens are predicted, in passes without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from vespo_megatron.megatron.hf_weights import unwrap
from vespo_megatron.megatron.micro_batch import MicroBatch
from vespo_megatron.megatron.parallel import RankInfo, tensor_group

# isort: split
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule


class HiddenStates:
    """Listens to the layers of a rank's model chunks.

    Args:
        chunks: of the policy; a chunk meets the micro-batches of a pass in their order.
    """

    def __init__(self, chunks: Sequence[MegatronModule], rank_info: RankInfo) -> None:
        self.rank_info = rank_info
        self.layers: dict[int, torch.nn.Module] = {
            layer.layer_number: layer for chunk in chunks for layer in unwrap(chunk).decoder.layers
        }
        """By number in the whole model, from 1."""

    @contextmanager
    def of(self, micro_batches: Sequence[MicroBatch]) -> Iterator[dict[int, list[torch.Tensor]]]:
        """Layer → float32 [R, hidden size] of each micro-batch, on the host, filled by one pass within the block."""
        heard: dict[int, list[torch.Tensor]] = {number: [] for number in self.layers}
        with ExitStack() as stack:
            for number, layer in self.layers.items():
                handle = layer.register_forward_hook(self._listener(micro_batches, heard[number]))
                stack.callback(handle.remove)
            yield heard

    def _listener(self, micro_batches: Sequence[MicroBatch], heard: list[torch.Tensor]) -> Any:
        def listen(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            hidden = (output[0] if isinstance(output, tuple) else output)[:, 0]
            if self.rank_info.tensor_size > 1:  # each of its ranks has a shard of the tokens
                hidden = gather_from_sequence_parallel_region(hidden, group=tensor_group())
            heard.append(hidden.index_select(0, micro_batches[len(heard)].request.rows).float().cpu())

        return listen
