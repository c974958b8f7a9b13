"""Nested mappings and dotted keys: `{"a": {"b": 1}}` ↔ `{"a.b": 1}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that is no mapping, or an empty one."""
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `leaves`."""
    content: dict[str, Any] = {}
    for name, value in values.items():
        *parents, leaf = name.split(".")
        group = content
        for parent in parents:
            group = group.setdefault(parent, {})
        group[leaf] = value
    return content
