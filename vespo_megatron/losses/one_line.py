"""`repr` of dataclasses that hold tensors as one line: types and shapes, not numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from torch import Tensor

LONGEST = 4
"""A list or mapping with more entries is shown by their number, as is one of tensors by name."""


class OneLine:
    """Base of a dataclass with `repr=False`: its `repr` is `Name(field=float32 [5], …)`, without what is None."""

    def __repr__(self) -> str:
        return _of_fields(self, every=True)


def _of_fields(value: Any, *, every: bool) -> str:
    """The dataclass `value` by its fields: every one that is not None, or those that differ from their defaults."""
    shown = []
    for field in fields(value):
        found = getattr(value, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        differs = isinstance(found, Tensor) or found != default
        if field.repr and found is not None and (every or differs):
            shown.append(f"{field.name}={one_line(found)}")
    return f"{type(value).__name__}({', '.join(shown)})"


def one_line(value: Any) -> str:
    """`value` on one line: a tensor is its type and shape, or its number where it has one in host memory."""
    if isinstance(value, Tensor):
        if value.dim() == 0 and value.is_cpu:
            return f"{value.item():.6g}"
        place = "" if value.is_cpu else f" on {value.device}"
        gradient = ", requires grad" if value.requires_grad else ""
        return f"<{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{place}{gradient}>"
    if isinstance(value, OneLine):
        return repr(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _of_fields(value, every=False)
    if isinstance(value, Mapping):
        if len(value) > LONGEST or any(isinstance(entry, (Tensor, tuple)) for entry in value.values()):
            return f"{{{len(value)} entries}}"
        return "{" + ", ".join(f"{key!r}: {one_line(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inside = f"{len(value)} entries" if len(value) > LONGEST else ", ".join(map(one_line, value))
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    return " ".join(repr(value).split())
