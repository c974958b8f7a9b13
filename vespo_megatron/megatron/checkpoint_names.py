"""The keys of a policy checkpoint: one set for native layers and Transformer Engine's, and how older ones are read.

They are the keys of megatron-core's spec of Transformer Engine. A norm that this spec fuses into the linear layer after
it is named there in native layers too (gpt_layer_specs.py:423; of MoE layers `native.spec`), experts have
`SequentialMLP`'s keys. `_extra_state` is in neither: it holds the scales of FP8, which no policy trains in, and the two
kinds of layers have it in different places.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

_EXTRA_STATE = re.compile(r".*\._extra_state\d*")
_RENAMED = {
    # Native layers up to version 0.1: MoE layers called this norm as dense ones do.
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
"""Part of a key → what it was called before."""


def is_extra_state(name: str) -> bool:
    """Whether a module's state dict has this entry for FP8 alone."""
    return _EXTRA_STATE.fullmatch(name) is not None


def name_as_saved(state: dict[str, Any], folder: Path) -> None:
    """Give the tensors of `state` that `folder` has under an older key that key, in place."""
    tensors = [tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor | ShardedTensorFactory)]
    if any(new in tensor.key for new in _RENAMED for tensor in tensors):
        saved = load_sharded_metadata(str(folder))
        for tensor in tensors:
            tensor.key = _as_saved(tensor.key, saved)


def _as_saved(key: str, saved: Collection[str]) -> str:
    if key in saved:
        return key
    older = [key.replace(new, old) for new, old in _RENAMED.items() if new in key]
    return next((name for name in older if name in saved), key)
