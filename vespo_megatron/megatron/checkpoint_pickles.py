"""Reading a checkpoint without running what stands in it: of its pickles only data is taken.

torch.distributed.checkpoint unpickles `.metadata` and every object that is no tensor whatever they name; a checkpoint
from somebody else would be a program. Everything else that is read of one is JSON, safetensors or `weights_only`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner, filesystem, metadata
from torch.distributed.checkpoint.planner import ReadItem

_DESCRIBES = "torch.distributed.checkpoint.metadata"
"""Whose dataclasses and enumerations say what a checkpoint holds."""
_DATA = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}


@contextmanager
def data_only() -> Iterator[None]:
    """Within the block torch.distributed.checkpoint takes data from pickles, and raises UnpicklingError for more."""
    before = filesystem.pickle, default_planner.DefaultLoadPlanner.load_bytes
    filesystem.pickle = _Pickle()  # type: ignore[assignment]
    default_planner.DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
    try:
        yield
    finally:
        filesystem.pickle, default_planner.DefaultLoadPlanner.load_bytes = before  # type: ignore[method-assign]


class _Pickle:
    """The module `pickle`, as filesystem.py:930 uses it; a checkpoint may be written meanwhile."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)

    def load(self, file: Any) -> Any:
        return _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == _DESCRIBES:
            known = getattr(getattr(metadata, name, None), "__module__", None) == module
        else:
            known = (module, name) in _DATA
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, which is not data")


def _load_bytes(self: default_planner.DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """default_planner.py:383, `weights_only`."""
    name, content = read_item.dest_index.fqn, torch.load(value, weights_only=True)
    if self.flatten_state_dict:
        default_planner.set_element(self.original_state_dict, self.mappings[name], content)
    else:
        self.state_dict[name] = content
