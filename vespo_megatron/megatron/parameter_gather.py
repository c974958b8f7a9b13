"""Completes the parameters of a rank before they are read outside a forward.

With `overlap_param_gather` an update changes a rank's own share alone, and the next forward gathers the others'
(distrib_optimizer.py:2617, distributed_data_parallel.py:455).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# isort: split
from megatron.core.distributed import DistributedDataParallel


def finish_parameter_gather(chunks: Sequence[torch.nn.Module]) -> None:
    """Gather now what the next forward would. A collective where something is left to gather."""
    for chunk in chunks:
        if not isinstance(chunk, DistributedDataParallel) or not chunk.ddp_config.overlap_param_gather:
            continue
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            if not group.param_gather_dispatched or group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)
